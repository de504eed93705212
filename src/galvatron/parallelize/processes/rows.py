"""Collectives with exact adjoints on rows, [N, ...], whose order among each other means nothing: tokens.

As in ``collectives``, every function is a linear map over all ranks of a group and its backward the map's transpose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .collectives import AxisGroup, all_gather, reduce_scatter


def gather_rows(x_N: Tensor, axes: AxisGroup) -> Tensor:
    """[N, ...] → [k·N, ...]: every rank's rows, of which all have N; backward sums and scatters."""
    return x_N if axes.size == 1 else _Gather.apply(x_N, axes)


def reduce_scatter_rows(x_N: Tensor, axes: AxisGroup) -> Tensor:
    """[k·N, ...] partial sums → [N, ...]: the sum of this rank's rows; backward gathers."""
    return x_N if axes.size == 1 else _ReduceScatter.apply(x_N, axes)


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
