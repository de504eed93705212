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

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron.internals import attend, attend_backward

from ..processes.collectives import AxisGroup, chunk_order
from .blocks import Block
from .hops import Packed, Ring


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
    ring = Ring.of(*settings)
    tokens, held = query.shape[2], Packed.of(key, value)
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
    ring = Ring.of(*settings)
    tokens, held = query.shape[2], Packed.of(key, value)
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


def _of_block(block: Block, query: Tensor, held: Packed) -> tuple[Tensor, Tensor, Tensor]:
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
