"""Ring attention: keys and values go round the ranks of a sequence while each attends with what it has.

Every rank keeps its queries; after cp - 1 hops it has seen all keys and values, and merged what each block of them gave
by log-sum-exp (Liu et al. 2023).  Backward sends them round again, with the float32 sum of their gradients one hop
behind; the last hop takes that home.  A message leaves before the block it travels beside is computed.

Packed documents are told by where each token's begins (``starts``, of the whole sequence): masks are made by block.

Under causal attention sequences are folded (``plan.axes``): whatever two ranks meet, half of their blocks see each
other, so all take equally long (``blocks``).

A *sink* is a score that every query of a head has beside those of its keys, and that no value goes with (Xiao et al.
2023; gpt-oss learns one a head).  It is one more block of the softmax, merged when all keys have been seen.  Kernels
know of none; a ring of one rank does.

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
from .blocks import Block, positions, seen, visible
from .documents import see_each_other


@dataclass(frozen=True)
class _Ring:
    """The ranks of a ring, and what two of them see of each other.

    ``chunks``: by rank, which of so many chunks a run is; ``pieces``: runs a rank has (in each half, if folded).
    """

    group: dist.ProcessGroup | None
    chunks: tuple[int, ...]
    pieces: int
    folded: bool
    causal: bool
    window: int | None
    scale: float

    @classmethod
    def of(cls, group: str, chunks: Sequence[int], *rest: Any) -> _Ring:
        return cls(group_named(group) if group else None, tuple(chunks), *rest)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

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

    def blocks(
        self, step: int, tokens: int, starts: Tensor | None, device: torch.device
    ) -> Iterator[tuple[Block, Tensor | None]]:
        """What is to be computed after ``step`` hops, every row in one block at most; masks as [..., rows, columns]."""
        queries, keys = self.runs(self.rank, tokens), self.runs(self.source(step), tokens)
        if not self.causal:
            blocks = iter([Block(slice(0, tokens), slice(0, tokens))])
        elif step == 0 and self.window is None:
            blocks = iter([Block(slice(0, tokens), slice(0, tokens), causal=True)])
        else:
            blocks = seen(queries, keys, self.window)
        for block in blocks:
            window = self.window if block.masked else None
            mask = visible(queries, keys, block, window, device) if block.masked else None
            if starts is not None:
                begin = starts[:, positions(queries, block.rows, device)]
                alike = see_each_other(begin, starts[:, positions(keys, block.columns, device)])
                mask = alike & visible(queries, keys, block, window, device) if self.causal else alike
            yield block, mask

    def pass_on(self, message: Tensor) -> Passing:
        """Send ``message`` to the next rank and receive as much from the previous one."""
        assert self.group is not None
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
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Attention of this rank's queries to the keys and values of all ranks of ``axes``: [B, N, S, D], as queries are.

    ``window``: positions that a query sees, itself included; only under causal attention.  ``starts`` [B, whole
    sequence]: where each token's document begins.  ``sinks_N``: of this rank's heads.
    """
    alone = axes.size == 1
    assert alone or isinstance(axes.group, dist.ProcessGroup)
    assert alone or axes.folded or not causal
    group = "" if alone else axes.group.group_name  # type: ignore[union-attr]
    chunks, pieces, folded = ([0], 1, False) if alone else (list(chunk_order(axes)), axes.pieces, axes.folded)
    scale = query_BNSD.shape[-1] ** -0.5 if scale is None else scale
    settings = (group, chunks, pieces, folded, causal, window, scale)
    out: Tensor = _attend(query_BNSD, key_BKSD, value_BKSD, sinks_N, starts, *settings)[0]
    return out


def _forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, starts: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    ring = _Ring.of(*settings)
    tokens, held = query.shape[2], _Packed.of(key, value)
    out, log_sum = _empty_output(query, value)
    total = torch.empty_like(out, dtype=torch.promote_types(out.dtype, torch.float32))
    for step in range(ring.size):
        passing = ring.pass_on(held.message) if step < ring.size - 1 else None
        for block, mask in ring.blocks(step, tokens, starts, query.device):
            part = attend(*_of_block(block, query, held), ring.scale, causal=block.causal, mask=mask)
            _merge(total[:, :, block.rows], log_sum[:, :, block.rows], *part, first=step == 0)
        held = held if passing is None else held.next(passing.wait())
    if sinks is not None:
        whole = torch.logaddexp(log_sum, sinks.to(log_sum.dtype)[:, None])
        total.mul_((log_sum - whole).exp_().unsqueeze(-1))
        log_sum = whole
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
    sinks: Tensor | None,
    starts: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ring = _Ring.of(*settings)
    tokens, held = query.shape[2], _Packed.of(key, value)
    wide = torch.promote_types(query.dtype, torch.float32)
    grad_query = torch.zeros_like(query, dtype=wide)
    home, travelling = held.zeros(wide), None
    for step in range(ring.size):
        passing = ring.pass_on(held.message) if step < ring.size - 1 else None
        made = home if step == 0 else held.zeros(wide)
        for block, mask in ring.blocks(step, tokens, starts, query.device):
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
    of_keys = home.key.to(key.dtype, copy=True), home.value.to(value.dtype, copy=True)
    return grad_query.to(query.dtype), *of_keys, _sink_gradient(grad, out, log_sum, sinks)


def _sink_gradient(grad: Tensor, out: Tensor, log_sum: Tensor, sinks: Tensor | None) -> Tensor:
    """[N]: of a score without a value, its weight times what the weights of all others gave, negated; or nothing."""
    if sinks is None:
        return grad.new_empty(0)
    weights_BNS = (sinks.to(log_sum.dtype)[:, None] - log_sum).exp()
    given_BNS = (grad.to(log_sum.dtype) * out).sum(dim=-1)
    return -(weights_BNS * given_BNS).sum(dim=(0, 2)).to(sinks.dtype)


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


def _of_block(block: Block, query: Tensor, held: _Packed) -> tuple[Tensor, Tensor, Tensor]:
    return query[:, :, block.rows], held.key[:, :, block.columns], held.value[:, :, block.columns]


def _empty_output(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output, whose heads are next to each other in memory, and log-sum-exp."""
    rows, heads, tokens, _ = query.shape
    out = query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)
    wide = torch.promote_types(query.dtype, torch.float32)
    return out, query.new_empty(rows, heads, tokens, dtype=wide)


_RING_ARGUMENTS = (
    "Tensor? sinks, Tensor? starts, str group, int[] chunks, int pieces, bool folded, bool causal, int? window, "
    "float scale"
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
    f"{_RING_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
RING: Any = torch.ops.galvatron.ring_attention.default
"""The dispatched operation of ``ring_attention``."""
INSIDE: dict[Any, Callable[..., Any]] = {RING: _forward, torch.ops.galvatron.ring_attention_backward.default: _backward}
"""What the operations of this module run, for those who count what happens inside of them."""


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_output(query, value)


@_attend_back.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor, sinks: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_sinks = grad.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(query), key.new_empty(key.shape), value.new_empty(value.shape), of_sinks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sinks, starts, *ctx.ring = inputs
    ctx.save_for_backward(query, key, value, *output, sinks, starts)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    *gradients, of_sinks = _attend_back(grad, *ctx.saved_tensors, *ctx.ring)
    return *gradients, of_sinks if of_sinks.numel() else None, None, *(None for _ in ctx.ring)


_attend.register_autograd(_differentiate, setup_context=_keep)
