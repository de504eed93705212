"""Ring attention: keys and values go round the ranks of a sequence while each attends with what it has.

Every rank keeps its queries; after cp - 1 hops it has seen all keys and values, and merged what each block of them gave
by log-sum-exp (Liu et al. 2023).  Backward sends them round again, with the float32 sum of their gradients one hop
behind; the last hop takes that home.  A message leaves before the block it travels beside is computed.

Packed documents are told by where each token's begins (``starts``, of the whole sequence): masks are made by block.

Under causal attention sequences are folded (``plan.axes``): whatever two ranks meet, half of their blocks see each
other, so all take equally long.  A rank's tokens are runs of ``width`` positions, ascending; of two runs from different
ranks one lies before the other, so that only windows need masks.

Both directions are operations of their own for the dispatcher: a selective recompute keeps what attention gave, and
compiled layers call them whole.

B rows, S local tokens, N query and K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron.internals import attend, attend_backward, group_named

from ..processes.collectives import AxisGroup, chunk_order
from .documents import see_each_other


@dataclass(frozen=True)
class _Block:
    """Queries of some rows that see keys of some columns: all of them, causally, or what a window says."""

    rows: slice
    columns: slice
    causal: bool = False
    masked: bool = False


@dataclass(frozen=True)
class _Ring:
    """The ranks of a ring, and what two of them see of each other.

    ``chunks``: by rank, which of so many chunks a run is; ``pieces``: runs a rank has (in each half, if folded).
    """

    group: dist.ProcessGroup
    chunks: tuple[int, ...]
    pieces: int
    folded: bool
    causal: bool
    window: int | None
    scale: float

    @classmethod
    def of(cls, group: str, chunks: Sequence[int], *rest: Any) -> _Ring:
        return cls(group_named(group), tuple(chunks), *rest)

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return len(self.chunks)

    def source(self, step: int) -> int:
        """Whose keys and values are here after ``step`` hops."""
        return (self.rank - step) % self.size

    def runs(self, rank: int, tokens: int) -> list[range]:
        """The positions of ``rank``, ascending, of ``tokens`` it has."""
        width = tokens // (self.pieces * (1 + self.folded))
        shorter = width
        while self.window is not None and shorter % 2 == 0 and shorter // 2 >= self.window:
            shorter //= 2  # what a window leaves of scores is a band, computed by short runs
        indices = [piece * self.size + self.chunks[rank] for piece in range(self.pieces)]
        if self.folded:
            indices += [2 * self.pieces * self.size - 1 - index for index in reversed(indices)]
        starts = (start for index in indices for start in range(index * width, (index + 1) * width, shorter))
        return [range(start, start + shorter) for start in starts]

    def blocks(self, step: int, tokens: int, starts: Tensor | None) -> Iterator[tuple[_Block, Tensor | None]]:
        """What is to be computed after ``step`` hops, every row in one block at most; masks as [..., rows, columns]."""
        queries, keys = self.runs(self.rank, tokens), self.runs(self.source(step), tokens)
        if not self.causal:
            blocks = iter([_Block(slice(0, tokens), slice(0, tokens))])
        elif step == 0 and self.window is None:
            blocks = iter([_Block(slice(0, tokens), slice(0, tokens), causal=True)])
        else:
            blocks = _merged(_seen(queries, keys, self.window))
        for block in blocks:
            window = self.window if block.masked else None
            mask = _visible(queries, keys, block, window) if block.masked else None
            if starts is not None:
                seen = see_each_other(starts[:, _at(queries, block.rows)], starts[:, _at(keys, block.columns)])
                mask = seen & _visible(queries, keys, block, window).to(seen.device) if self.causal else seen
            yield block, mask

    def pass_on(self, message: Tensor) -> Passing:
        """Send ``message`` to the next rank and receive as much from the previous one."""
        received = torch.empty_like(message)
        ranks = dist.get_process_group_ranks(self.group)
        after, before = ranks[(self.rank + 1) % self.size], ranks[(self.rank - 1) % self.size]
        sent = dist.P2POp(dist.isend, message, after, self.group)
        comes = dist.P2POp(dist.irecv, received, before, self.group)
        return Passing(message, received, dist.batch_isend_irecv([sent, comes]))


@dataclass(frozen=True)
class Passing:
    """A message on its way, held until it has left, and the one that takes its place."""

    sent: Tensor
    received: Tensor
    works: Sequence[dist.Work]

    def wait(self) -> Tensor:
        """What was received."""
        for work in self.works:
            work.wait()
        return self.received


def ring_attention(
    query_BNSD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    axes: AxisGroup,
    scale: float | None,
    window: int | None,
    *,
    causal: bool,
    starts: Tensor | None = None,
) -> Tensor:
    """Attention of this rank's queries to the keys and values of all ranks of ``axes``: [B, N, S, D], as queries are.

    ``window``: positions that a query sees, itself included; only under causal attention.  ``starts`` [B, whole
    sequence]: where each token's document begins.
    """
    assert isinstance(axes.group, dist.ProcessGroup)
    assert axes.folded or not causal
    group, chunks = axes.group.group_name, list(chunk_order(axes))
    scale = query_BNSD.shape[-1] ** -0.5 if scale is None else scale
    settings = (group, chunks, axes.pieces, axes.folded, causal, window, scale)
    out: Tensor = _attend(query_BNSD, key_BKSD, value_BKSD, starts, *settings)[0]
    return out


def _seen(queries: list[range], keys: list[range], window: int | None) -> Iterator[_Block]:
    """For every run of queries the runs of keys that it sees."""
    width = len(queries[0])
    for nth, query in enumerate(queries):
        first = 0 if window is None else query.start - window + 1
        seen = [i for i, key in enumerate(keys) if key.start < query.stop and key.stop > first]
        if seen:
            partly = window is not None and keys[seen[0]].start <= query[-1] - window
            whole = keys[seen[-1]].stop <= query.start + 1 and not partly
            rows = slice(nth * width, (nth + 1) * width)
            yield _Block(rows, slice(seen[0] * width, (seen[-1] + 1) * width), masked=not whole)


def _merged(blocks: Iterator[_Block]) -> Iterator[_Block]:
    """Neighbours that see the same, in one."""
    last: _Block | None = None
    for block in blocks:
        if last is None or block.masked or (last.columns, last.masked) != (block.columns, False):
            if last is not None:
                yield last
            last = block
        else:
            last = _Block(slice(last.rows.start, block.rows.stop), block.columns)
    if last is not None:
        yield last


def _visible(queries: list[range], keys: list[range], block: _Block, window: int | None) -> Tensor:
    distance = _at(queries, block.rows)[:, None] - _at(keys, block.columns)[None, :]
    return (distance >= 0) & (distance < window) if window is not None else distance >= 0


def _at(runs: list[range], tokens: slice) -> Tensor:
    """The positions of some ``tokens`` of ``runs``."""
    return torch.cat([torch.arange(run.start, run.stop) for run in runs])[tokens]


def _forward(query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
    ring = _Ring.of(*settings)
    tokens, held = query.shape[2], _Packed.of(key, value)
    out, log_sum = _empty_output(query, value)
    total = torch.empty_like(out, dtype=torch.promote_types(out.dtype, torch.float32))
    for step in range(ring.size):
        passing = ring.pass_on(held.message) if step < ring.size - 1 else None
        for block, mask in ring.blocks(step, tokens, starts):
            part = attend(*_of_block(block, query, held), ring.scale, causal=block.causal, mask=mask)
            _merge(total[:, :, block.rows], log_sum[:, :, block.rows], *part, first=step == 0)
        held = held if passing is None else held.next(passing.wait())
    return out.copy_(total), log_sum


def _merge(total: Tensor, log_sum: Tensor, part: Tensor, part_log_sum: Tensor, *, first: bool) -> None:
    """Add what another block of keys gave to the softmax so far, in place."""
    if first:
        total.copy_(part)
        log_sum.copy_(part_log_sum)
        return
    merged = torch.logaddexp(log_sum, part_log_sum)
    total.mul_((log_sum - merged).exp().unsqueeze(-1)).add_(part * (part_log_sum - merged).exp().unsqueeze(-1))
    log_sum.copy_(merged)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    starts: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    ring = _Ring.of(*settings)
    tokens, held = query.shape[2], _Packed.of(key, value)
    wide = torch.promote_types(query.dtype, torch.float32)
    grad_query = torch.zeros_like(query, dtype=wide)
    home, travelling = held.zeros(wide), None
    for step in range(ring.size):
        passing = ring.pass_on(held.message) if step < ring.size - 1 else None
        made = home if step == 0 else held.zeros(wide)
        for block, mask in ring.blocks(step, tokens, starts):
            given = (grad[:, :, block.rows], *_of_block(block, query, held))
            found = (out[:, :, block.rows].contiguous(), log_sum[:, :, block.rows].contiguous())
            parts = attend_backward(*given, *found, ring.scale, causal=block.causal, mask=mask)
            grad_query[:, :, block.rows] += parts[0]
            made.key[:, :, block.columns] += parts[1]
            made.value[:, :, block.columns] += parts[2]
        if step > 0:
            if travelling is not None:
                made.message.add_(travelling.wait())
            travelling = ring.pass_on(made.message)
        held = held if passing is None else held.next(passing.wait())
    if travelling is not None:
        home.message.add_(travelling.wait())
    return grad_query.to(query.dtype), home.key.to(key.dtype, copy=True), home.value.to(value.dtype, copy=True)


@dataclass(frozen=True)
class _Packed:
    """Keys and values, or their gradients, in one message; [B, K, S, D] each are views of it."""

    message: Tensor
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> _Packed:
        return cls(torch.cat((key.flatten(), value.flatten())), tuple(key.shape), tuple(value.shape))

    @property
    def key(self) -> Tensor:
        return self.message[: self._key_elements].view(self.key_shape)

    @property
    def value(self) -> Tensor:
        return self.message[self._key_elements :].view(self.value_shape)

    @property
    def _key_elements(self) -> int:
        return torch.Size(self.key_shape).numel()

    def next(self, message: Tensor) -> _Packed:
        return _Packed(message, self.key_shape, self.value_shape)

    def zeros(self, dtype: torch.dtype) -> _Packed:
        return self.next(torch.zeros_like(self.message, dtype=dtype))


def _of_block(block: _Block, query: Tensor, held: _Packed) -> tuple[Tensor, Tensor, Tensor]:
    return query[:, :, block.rows], held.key[:, :, block.columns], held.value[:, :, block.columns]


def _empty_output(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output, whose heads are next to each other in memory, and log-sum-exp."""
    rows, heads, tokens, _ = query.shape
    out = query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)
    wide = torch.promote_types(query.dtype, torch.float32)
    return out, query.new_empty(rows, heads, tokens, dtype=wide)


_RING_ARGUMENTS = (
    "Tensor? starts, str group, int[] chunks, int pieces, bool folded, bool causal, int? window, float scale"
)
_attend = torch.library.custom_op(
    "galvatron::ring_attention",
    _forward,
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {_RING_ARGUMENTS}) -> (Tensor, Tensor)",
)
_attend_back = torch.library.custom_op(
    "galvatron::ring_attention_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor log_sum, "
    f"{_RING_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
RING: Any = torch.ops.galvatron.ring_attention.default
"""The dispatched operation of ``ring_attention``."""
INSIDE: dict[Any, Callable[..., Any]] = {RING: _forward, torch.ops.galvatron.ring_attention_backward.default: _backward}
"""What the operations of this module run, for those who count what happens inside of them."""


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_output(query, value)


@_attend_back.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, starts, *ctx.ring = inputs
    ctx.save_for_backward(query, key, value, *output, starts)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    return *_attend_back(grad, *ctx.saved_tensors, *ctx.ring), None, *(None for _ in ctx.ring)


_attend.register_autograd(_differentiate, setup_context=_keep)
