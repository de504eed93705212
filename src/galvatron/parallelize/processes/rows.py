"""Collectives with exact adjoints on rows, [N, ...], whose order among each other means nothing: tokens.

As in ``collectives``, every function is a linear map over all ranks of a group and its backward the map's transpose.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron.internals import exchange_rows

from .collectives import ALONE, AxisGroup, all_gather, reduce_scatter


@dataclass(frozen=True)
class ExpertGroups:
    """Ranks that experts are dealt to, and all of these with their tensor-parallel ranks (innermost)."""

    ep: AxisGroup = ALONE
    both: AxisGroup = ALONE


@dataclass(frozen=True)
class Traffic:
    """How many rows go to each rank of a group, and come from it."""

    sent: tuple[int, ...]
    received: tuple[int, ...]

    @property
    def back(self) -> Traffic:
        """The same rows on their way home."""
        return Traffic(self.received, self.sent)


def gather_rows(x_N: Tensor, axes: AxisGroup) -> Tensor:
    """[N, ...] → [k·N, ...]: every rank's rows, of which all have N; backward sums and scatters."""
    return x_N if axes.size == 1 else _Gather.apply(x_N, axes)


def reduce_scatter_rows(x_N: Tensor, axes: AxisGroup) -> Tensor:
    """[k·N, ...] partial sums → [N, ...]: the sum of this rank's rows; backward gathers."""
    return x_N if axes.size == 1 else _ReduceScatter.apply(x_N, axes)


def send_rows(parts: tuple[Tensor, ...], traffic: Traffic, axes: AxisGroup) -> tuple[Tensor, ...]:
    """[rows sent, n] of every tensor → [rows received, n], by rank of the other side; one message for all of them.

    Backward sends the gradients home.
    """
    sent: tuple[Tensor, ...] = _Send.apply(traffic, axes, *parts)
    return sent


def add_rows(values_NH: Tensor, row_N: Tensor, rows: int) -> Tensor:
    """[N, H] → [rows, H]: the values added up by row, on CUDA too in one order; backward takes them out again."""
    added: Tensor = _Add.apply(values_NH, row_N, rows)
    return added


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, row_N: Tensor, rows: int) -> Tensor:
        ctx.row_N = row_N  # not saved: recompute would run all before it again for that
        return values.new_zeros(rows, values.shape[1]).index_put((row_N,), values, accumulate=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.row_N], None, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, traffic: Traffic, axes: AxisGroup, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.traffic, ctx.axes = traffic, axes
        return _send(parts, traffic, axes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_send(grads, ctx.traffic.back, ctx.axes)


def _send(parts: tuple[Tensor, ...], traffic: Traffic, axes: AxisGroup) -> tuple[Tensor, ...]:
    """As bytes, side by side: parts may be of different dtypes."""
    assert isinstance(axes.group, dist.ProcessGroup)
    rows = [part.contiguous().view(torch.uint8) for part in parts]
    received = exchange_rows(torch.cat(rows, dim=1), [*traffic.sent], [*traffic.received], axes.group)
    ends = [0, *itertools.accumulate(row.shape[1] for row in rows)]
    return tuple(
        received[:, start:end].contiguous().view(part.dtype)
        for part, (start, end) in zip(parts, itertools.pairwise(ends), strict=True)
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: AxisGroup) -> Tensor:
        ctx.axes = axes
        return all_gather(x, axes).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad.unflatten(0, (ctx.axes.size, -1)), ctx.axes), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: AxisGroup) -> Tensor:
        ctx.axes = axes
        return reduce_scatter(x.unflatten(0, (axes.size, -1)), axes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axes).flatten(0, 1), None
