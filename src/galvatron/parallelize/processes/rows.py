"""Collectives with exact adjoints on rows, [N, ...], whose order among each other means nothing: tokens.

As in ``collectives``, every function is a linear map over all ranks of a group and its backward the map's transpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron.internals import arrived, exchange_rows

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


class Passage:
    """Rows on their way to the ranks of a group, and later their gradients on the way home: one message each way."""

    def __init__(self, traffic: Traffic, axes: AxisGroup) -> None:
        assert isinstance(axes.group, dist.ProcessGroup)
        self.traffic, self._group = traffic, axes.group
        self._message: Tensor | None = None
        self._dtypes: list[torch.dtype] = []
        self._widths: list[int] = []

    def leave(self, parts: tuple[Tensor, ...], traffic: Traffic) -> None:
        """Send the rows of all ``parts`` side by side; as bytes, for they may be of different dtypes."""
        rows = [part.contiguous().view(torch.uint8) for part in parts]
        self._dtypes, self._widths = [part.dtype for part in parts], [row.shape[1] for row in rows]
        self._message = exchange_rows(torch.cat(rows, dim=1), [*traffic.sent], [*traffic.received], self._group)

    def arrive(self) -> tuple[Tensor, ...]:
        """Wait for the rows that others sent."""
        assert self._message is not None
        received, self._message = arrived(self._message), None
        columns = received.split(self._widths, dim=1)
        return tuple(rows.contiguous().view(dtype) for rows, dtype in zip(columns, self._dtypes, strict=True))


def start_rows(parts: tuple[Tensor, ...], traffic: Traffic, axes: AxisGroup) -> tuple[Passage, Tensor]:
    """Send [rows sent, n] of every tensor; what ``finish_rows`` takes.

    What is computed before that runs beside the message; and its backward beside that of the gradients on their way
    home, since autograd begins with what was computed last.
    """
    passage = Passage(traffic, axes)
    return passage, _Start.apply(passage, *parts)


def finish_rows(passage: Passage, token: Tensor) -> tuple[Tensor, ...]:
    """[rows received, n] of every tensor, by rank of the other side."""
    received: tuple[Tensor, ...] = _Finish.apply(token, passage)
    return received


def send_rows(parts: tuple[Tensor, ...], traffic: Traffic, axes: AxisGroup) -> tuple[Tensor, ...]:
    """[rows sent, n] of every tensor → [rows received, n], by rank of the other side; one message for all of them.

    Backward sends the gradients home.
    """
    return finish_rows(*start_rows(parts, traffic, axes))


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


class _Start(torch.autograd.Function):
    # gives a number that stands for the message, so that autograd knows who ends what this begins
    @staticmethod
    def forward(ctx: Any, passage: Passage, *parts: Tensor) -> Tensor:
        ctx.passage = passage
        passage.leave(parts, passage.traffic)
        return parts[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.passage.arrive()


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, passage: Passage) -> tuple[Tensor, ...]:
        ctx.passage = passage
        return passage.arrive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.passage.leave(grads, ctx.passage.traffic.back)
        return grads[0].new_zeros(()), None


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
