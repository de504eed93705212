"""Collectives with exact adjoints on sequence- and batch-cut hidden states.

Shapes: B batch rows, S sequence positions, k ranks of an axis group, ... any trailing dims.  Every function
is a linear map over all ranks of the group; its backward is that map's transpose, so gradients are plain
sums over ranks (the one gradient rule).  Chunk order is that of plan.axes: the innermost axis cuts the
sequence coarsest, while group ranks count it fastest, and a folded sequence is cut from both ends; ``split`` and
``join`` translate.  What is local is always in the order of positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from galvatron import internals
from galvatron.plan.filling import Filling

from .lockstep import Lockstep


@dataclass(frozen=True)
class AxisGroup:
    """The ranks along a product of axes.

    Attributes:
        group: their process group, or threads of this process.  None with ``size`` > 1 is a stand-in that moves
            nothing: gathering repeats this rank's chunk and scattering keeps one, which is what measuring compute
            alone needs.
        sizes: axis sizes, innermost first.
        rank: this rank's index in the group.
        pieces: in how many runs coarser axes, which are gathered, have cut what the group holds together.
        folded: whether the sequence is.
        filling: of sequences that are filled up before they are cut.
    """

    group: dist.ProcessGroup | Lockstep | None
    sizes: tuple[int, ...]
    rank: int
    pieces: int = 1
    folded: bool = False
    filling: Filling | None = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes)


ALONE = AxisGroup(None, (), 0)
"""This rank by itself."""


def gather_sequence(x_BS: Tensor, axes: AxisGroup) -> Tensor:
    """[B, S/k, ...] → [B, S, ...]: all-gather of the sequence; backward reduce-scatters."""
    return x_BS if axes.size == 1 else _GatherSequence.apply(x_BS, axes)


def whole_sequence(x_BS: Tensor, axes: AxisGroup) -> Tensor:
    """``gather_sequence`` for what a module returns: no view, of whose hooks FSDP2 warns."""
    return x_BS if axes.size == 1 else _WholeSequence.apply(x_BS, axes)


def own_part(x_BS: Tensor, axes: AxisGroup) -> Tensor:
    """[B, S, ...] → [B, S/k, ...]: this rank's part of sequences that every rank has whole.

    A gradient of the whole is then this rank's part of a sum over ranks.  No view, which would keep all parts.
    """
    return x_BS if axes.size == 1 else split(filled_up(x_BS, axes), axes)[axes.rank].clone()


def reduce_scatter_sequence(x_BS: Tensor, axes: AxisGroup) -> Tensor:
    """[B, S, ...] partial sums → [B, S/k, ...] their sum, cut; backward all-gathers."""
    return x_BS if axes.size == 1 else _ReduceScatterSequence.apply(x_BS, axes)


def batch_to_sequence(x_BS: Tensor, axes: AxisGroup) -> Tensor:
    """[B, S, ...] → [k·B, S/k, ...]: the axes stop cutting the batch and cut the sequence; one all-to-all."""
    return x_BS if axes.size == 1 else _BatchToSequence.apply(x_BS, axes)


def sequence_to_batch(x_BS: Tensor, axes: AxisGroup) -> Tensor:
    """[k·B, S/k, ...] → [B, S, ...]: the inverse, and the adjoint, of ``batch_to_sequence``."""
    return x_BS if axes.size == 1 else _SequenceToBatch.apply(x_BS, axes)


def sum_of_ranks(x: Tensor, axes: AxisGroup) -> Tensor:
    """[...] → [...]: the sum over ranks, on each of them; backward sums too."""
    return x if axes.size == 1 else _Sum.apply(x, axes)


def all_reduce_(x: Tensor, op: dist.ReduceOp.RedOpType, axes: AxisGroup) -> None:
    """Sum, or whatever ``op`` is, over ranks in place; without a gradient."""
    if isinstance(axes.group, Lockstep):
        every = axes.group.all_gather(x, axes.rank)
        x.copy_(every.sum(dim=0) if op == dist.ReduceOp.SUM else every.amax(dim=0))
    elif axes.group is not None:
        dist.all_reduce(x, op=op, group=axes.group)


def exchange(x_k: Tensor, axes: AxisGroup) -> Tensor:
    """[k, ...] → [k, ...]: entry g goes to rank g; entry g comes from rank g.  Its own adjoint, but for the ranks."""
    return x_k if axes.size == 1 else _Exchange.apply(x_k, axes)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: AxisGroup) -> Tensor:
        ctx.axes = axes
        gathered = join(all_gather(x, axes), axes)
        # torch 2.11 loses the gradient, in silence, where a compiled function returns what it takes for a view
        return gathered.clone() if torch.compiler.is_compiling() else gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(split(grad, ctx.axes), ctx.axes), None


class _WholeSequence(_GatherSequence):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: AxisGroup) -> Tensor:
        return internals.owned(_GatherSequence.forward(ctx, x, axes))


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: AxisGroup) -> Tensor:
        ctx.axes = axes
        return reduce_scatter(split(x, axes), axes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return join(all_gather(grad, ctx.axes), ctx.axes), None


class _BatchToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: AxisGroup) -> Tensor:
        ctx.axes = axes
        return internals.owned(_exchange(split(filled_up(x, axes), axes), axes).flatten(0, 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return join(_exchange(grad.unflatten(0, (ctx.axes.size, -1)), ctx.axes), ctx.axes), None


class _SequenceToBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: AxisGroup) -> Tensor:
        ctx.axes = axes
        return internals.owned(join(_exchange(x.unflatten(0, (axes.size, -1)), axes), axes))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(split(grad, ctx.axes), ctx.axes).flatten(0, 1), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: AxisGroup) -> Tensor:
        ctx.axes = axes
        return all_gather(x, axes).sum(dim=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axes).sum(dim=0), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: AxisGroup) -> Tensor:
        ctx.axes = axes
        return _exchange(x, axes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, ctx.axes), None


def of_spans(x_S: Tensor, spans: tuple[range, ...]) -> Tensor:
    """[..., S] → [..., positions]: what stands at the positions that the spans count."""
    parts = [x_S[..., span.start : span.stop] for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def chunk_order(axes: AxisGroup) -> tuple[int, ...]:
    """By rank of the group, which of its ``size`` chunks it holds: the innermost axis is the coarsest cut."""
    order = [0]
    for size in axes.sizes:
        order = [chunk * size + digit for digit in range(size) for chunk in order]
    return tuple(order)


def filled_up(x_BS: Tensor, axes: AxisGroup) -> Tensor:
    """[B, S, ...], what layers begin with, filled up where its axes want it: with copies of the last token.

    Of zeros a norm in halves divides by a variance of nothing (ViT's eps is 1e-12), whose gradients are no numbers.
    """
    if axes.filling is None or x_BS.shape[1] != axes.filling.tokens:
        return x_BS
    more = axes.filling.filled - axes.filling.tokens
    return torch.cat((x_BS, x_BS[:, -1:].detach().expand(-1, more, *x_BS.shape[2:])), dim=1)


def split(x_BS: Tensor, axes: AxisGroup) -> Tensor:
    """[B, S, ...] → contiguous [k, B, S/k, ...]: entry g is the sequence chunk of group rank g; zeros fill it up."""
    if axes.filling is not None and x_BS.shape[1] == axes.filling.tokens:
        x_BS = pad(x_BS, (*(0, 0) * (x_BS.dim() - 2), 0, axes.filling.filled - axes.filling.tokens))
    n, halves = len(axes.sizes), 1 + axes.folded
    runs = x_BS.unflatten(1, (halves, axes.pieces, *axes.sizes, x_BS.shape[1] // (halves * axes.pieces * axes.size)))
    runs = _mirrored(runs, range(3, n + 3)) if axes.folded else runs
    order = (*range(n + 2, 2, -1), 0, 1, 2, *range(n + 3, runs.dim()))
    return runs.permute(order).flatten(0, n - 1).flatten(2, 4).contiguous()


def join(x_kBS: Tensor, axes: AxisGroup) -> Tensor:
    """[k, B, S/k, ...] → [B, S, ...]: the inverse of ``split``."""
    n, halves = len(axes.sizes), 1 + axes.folded
    runs = x_kBS.unflatten(2, (halves, axes.pieces, x_kBS.shape[2] // (halves * axes.pieces)))
    runs = runs.unflatten(0, axes.sizes[::-1])
    runs = runs.permute((n, n + 1, n + 2, *range(n - 1, -1, -1), *range(n + 3, runs.dim())))
    runs = _mirrored(runs, range(3, n + 3)) if axes.folded else runs
    joined = runs.flatten(1, n + 3)
    whole = joined if axes.filling is None else joined[:, : axes.filling.tokens]
    return whole.contiguous()


def _mirrored(runs: Tensor, dims: range) -> Tensor:
    """The second half, which is cut from its end, with the order of its cuts reversed."""
    return torch.cat((runs[:, :1], runs[:, 1:].flip(tuple(dims))), dim=1)


def all_gather(x: Tensor, axes: AxisGroup) -> Tensor:
    """[...] → [k, ...]."""
    if axes.group is None:
        return x.expand(axes.size, *x.shape).contiguous()
    if isinstance(axes.group, Lockstep):
        return axes.group.all_gather(x, axes.rank)
    return internals.all_gather(x.contiguous().view(-1), axes.group).view(axes.size, *x.shape)


def reduce_scatter(x_k: Tensor, axes: AxisGroup) -> Tensor:
    """[k, ...] → [...]: entry ``rank`` summed over the ranks; no view, on which FSDP2's hooks could get lost."""
    if axes.group is None:
        return torch.select_copy(x_k, 0, axes.rank)  # not a clone: recompute tells what stands for a sum by it
    if isinstance(axes.group, Lockstep):
        return axes.group.all_gather(x_k, axes.rank)[:, axes.rank].sum(dim=0)
    return internals.reduce_scatter(x_k.flatten(0, 1), axes.group)


def _exchange(x_k: Tensor, axes: AxisGroup) -> Tensor:
    """[k, ...] → [k, ...]: entry g goes to rank g; entry g comes from rank g."""
    x_k = x_k.contiguous()
    if axes.group is None:
        return x_k.clone()
    if isinstance(axes.group, Lockstep):
        return axes.group.all_gather(x_k, axes.rank)[:, axes.rank]
    return internals.all_to_all(x_k, axes.group)
