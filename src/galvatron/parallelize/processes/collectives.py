"""Collectives with exact adjoints on sequence- and batch-cut hidden states.

Shapes: B batch rows, S sequence positions, k ranks of an axis group, ... any trailing dims.  Every function
is a linear map over all ranks of the group; its backward is that map's transpose, so gradients are plain
sums over ranks (the one gradient rule).  Chunk order is that of plan.axes: the innermost axis cuts the
sequence coarsest, while group ranks count it fastest; ``_fold`` and ``_unfold`` translate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron.internals import all_gather, reduce_scatter


@dataclass(frozen=True)
class AxisGroup:
    """The ranks along a product of axes.

    Attributes:
        group: their process group.  None with ``size`` > 1 is a stand-in that moves nothing: gathering repeats
            this rank's chunk and scattering keeps one, which is what measuring compute alone needs.
        sizes: axis sizes, innermost first.
        rank: this rank's index in the group.
    """

    group: dist.ProcessGroup | None
    sizes: tuple[int, ...]
    rank: int

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes)


def gather_sequence(x_BS: Tensor, axes: AxisGroup) -> Tensor:
    """[B, S/k, ...] → [B, S, ...]: all-gather of the sequence; backward reduce-scatters."""
    return x_BS if axes.size == 1 else _GatherSequence.apply(x_BS, axes)


def reduce_scatter_sequence(x_BS: Tensor, axes: AxisGroup) -> Tensor:
    """[B, S, ...] partial sums → [B, S/k, ...] their sum, cut; backward all-gathers."""
    return x_BS if axes.size == 1 else _ReduceScatterSequence.apply(x_BS, axes)


def batch_to_sequence(x_BS: Tensor, axes: AxisGroup) -> Tensor:
    """[B, S, ...] → [k·B, S/k, ...]: the axes stop cutting the batch and cut the sequence; one all-to-all."""
    return x_BS if axes.size == 1 else _BatchToSequence.apply(x_BS, axes)


def sequence_to_batch(x_BS: Tensor, axes: AxisGroup) -> Tensor:
    """[k·B, S/k, ...] → [B, S, ...]: the inverse, and the adjoint, of ``batch_to_sequence``."""
    return x_BS if axes.size == 1 else _SequenceToBatch.apply(x_BS, axes)


def exchange(x_k: Tensor, axes: AxisGroup) -> Tensor:
    """[k, ...] → [k, ...]: entry g goes to rank g; entry g comes from rank g.  Its own adjoint, but for the ranks."""
    return x_k if axes.size == 1 else _Exchange.apply(x_k, axes)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: AxisGroup) -> Tensor:
        ctx.axes = axes
        gathered = _unfold(_all_gather(x, axes), axes)
        # torch 2.11 loses the gradient, in silence, where a compiled function returns a view
        return gathered.clone() if torch.compiler.is_compiling() else gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(_fold(grad, ctx.axes), ctx.axes), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: AxisGroup) -> Tensor:
        ctx.axes = axes
        return _reduce_scatter(_fold(x, axes), axes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _unfold(_all_gather(grad, ctx.axes), ctx.axes), None


class _BatchToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: AxisGroup) -> Tensor:
        ctx.axes = axes
        return _exchange(_fold(x, axes), axes).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _unfold(_exchange(grad.unflatten(0, (ctx.axes.size, -1)), ctx.axes), ctx.axes), None


class _SequenceToBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: AxisGroup) -> Tensor:
        ctx.axes = axes
        return _unfold(_exchange(x.unflatten(0, (axes.size, -1)), axes), axes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(_fold(grad, ctx.axes), ctx.axes).flatten(0, 1), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: AxisGroup) -> Tensor:
        ctx.axes = axes
        return _exchange(x, axes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad, ctx.axes), None


def _fold(x_BS: Tensor, axes: AxisGroup) -> Tensor:
    """[B, S, ...] → contiguous [k, B, S/k, ...]: entry g is the sequence chunk of group rank g."""
    n = len(axes.sizes)
    chunks = x_BS.unflatten(1, (*axes.sizes, x_BS.shape[1] // axes.size))
    order = (*range(n, 0, -1), 0, *range(n + 1, chunks.dim()))
    return chunks.permute(order).flatten(0, n - 1).contiguous()


def _unfold(x_kBS: Tensor, axes: AxisGroup) -> Tensor:
    """[k, B, S/k, ...] → [B, S, ...]: the inverse of ``_fold``."""
    n = len(axes.sizes)
    chunks = x_kBS.unflatten(0, axes.sizes[::-1])
    order = (n, *range(n - 1, -1, -1), *range(n + 1, chunks.dim()))
    return chunks.permute(order).flatten(1, n + 1).contiguous()


def _all_gather(x: Tensor, axes: AxisGroup) -> Tensor:
    """[...] → [k, ...]."""
    if axes.group is None:
        return x.expand(axes.size, *x.shape).contiguous()
    return all_gather(x.contiguous().view(-1), axes.group).view(axes.size, *x.shape)


def _reduce_scatter(x_k: Tensor, axes: AxisGroup) -> Tensor:
    """[k, ...] → [...]: entry ``rank`` summed over the ranks; no view, on which FSDP2's hooks could get lost."""
    if axes.group is None:
        return torch.select_copy(x_k, 0, axes.rank)  # not a clone: recompute tells what stands for a sum by it
    return reduce_scatter(x_k.flatten(0, 1), axes.group)


def _exchange(x_k: Tensor, axes: AxisGroup) -> Tensor:
    """[k, ...] → [k, ...]: entry g goes to rank g; entry g comes from rank g."""
    x_k = x_k.contiguous()
    if axes.group is None:
        return x_k.clone()
    out = torch.empty_like(x_k)
    dist.all_to_all_single(out.view(-1), x_k.view(-1), group=axes.group)
    return out
