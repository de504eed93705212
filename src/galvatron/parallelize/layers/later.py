"""A backward in two passes: gradients of inputs first, those of linears' weights later (zero bubble; Qi et al. 2024).

A linear y = x Wᵀ with *taps* computes no gradient of W in its backward.  There it hands out x and the gradient of y
instead, as the gradients of two *leaves*, tensors of 4 bytes that the layer is given for every microbatch; so it is
the same eagerly, compiled and where x is computed again.  The weight pass multiplies them, once:

    dW = (dy)ᵀ x

and adds the product to where W's gradient is summed.  Everything else (biases, norms) stays in the first pass.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from galvatron.internals import float8_product, multiplies_in_float8

from .forward import wrap_forward

_LEAVES = "_galvatron_leaves"  # the attribute of a linear with taps that has this microbatch's two leaves
SLICE_ROWS = 1 << 14
"""Rows of a weight's gradient that are summed at a time where it has another dtype than the products."""


@dataclass(frozen=True)
class Tap:
    """A linear whose weight's gradient is made later.

    ``rows``: (start, number) of the part of the weight that this rank uses, along dim 0; None for all of it.
    """

    linear: nn.Module
    rows: tuple[int, int] | None = None

    def widths(self) -> tuple[int, int]:
        """Of x and of y."""
        rows, columns = self.linear.weight.shape  # type: ignore[misc]
        rows = rows if self.rows is None else self.rows[1]
        return (rows, columns) if isinstance(self.linear, Conv1D) else (columns, rows)

    def multiply(self, total: Tensor, x: Tensor, dy: Tensor) -> None:
        """Add dW to ``total``, of the weight's shape."""
        if self.rows is not None:
            total = total.narrow(0, *self.rows)
        left, right = (x, dy) if isinstance(self.linear, Conv1D) else (dy, x)
        add_product(total, left, right)


@dataclass(frozen=True)
class Place:
    """Where a weight's gradient is summed: ``gradient`` gives it, ``arrived`` is called after a step's last product."""

    gradient: Callable[[], Tensor]
    arrived: Callable[[], None] | None = None


@dataclass
class Later:
    """What the weight passes of a model chunk will multiply, a list a microbatch whose first pass is over.

    Attributes:
        taps: of every layer.
        places: of every linear with taps.
        finished: of some layers; called after their products, with whether they were the step's last.
    """

    taps: dict[nn.Module, tuple[Tap, ...]] = field(default_factory=dict)
    places: dict[nn.Module, Place] = field(default_factory=dict)
    finished: dict[nn.Module, Callable[[bool], None]] = field(default_factory=dict)
    _waiting: deque[list[tuple[nn.Module, list[Tensor | None]]]] = field(default_factory=deque)

    def begin(self) -> None:
        """A microbatch's first backward pass begins."""
        self._waiting.append([])

    def put(self, layer: nn.Module, caught: list[Tensor | None]) -> None:
        """Keep what the taps of a layer have caught: x and dy of each."""
        self._waiting[-1].append((layer, caught))

    def multiply(self, *, is_last: bool) -> None:
        """The weight pass of the microbatch that has waited longest; what it needed is let go of layer by layer."""
        layers = self._waiting.popleft()
        layers.reverse()
        while layers:
            layer, caught = layers.pop()
            for tap, x, dy in zip(self.taps[layer], caught[::2], caught[1::2], strict=True):
                place = self.places[tap.linear]
                if x is not None and dy is not None:
                    tap.multiply(place.gradient(), x, dy)
                if is_last and place.arrived is not None:
                    place.arrived()
            if layer in self.finished:
                self.finished[layer](is_last)

    def forget(self) -> None:
        """Drop what an interrupted step left."""
        self._waiting.clear()


def put_off(layer: nn.Module, tp_size: int, later: Later) -> None:
    """Let ``layer`` leave the gradients of its taps to ``later``; over its recompute and compilation."""
    taps = later.taps[layer]
    # linears keep their leaves, and the garbage collector does not see what those lead to
    own_later, own_layer = weakref.ref(later), weakref.ref(layer)

    def deliver(caught: list[Tensor | None]) -> None:
        later, layer = own_later(), own_layer()
        assert later is not None
        assert layer is not None
        later.put(layer, caught)

    def call(forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(hidden, *args, **kwargs)
        rows = hidden.shape[0] * hidden.shape[1] * tp_size
        shapes = [(rows, width) for tap in taps for width in tap.widths()]
        anchor = torch.empty((), device=hidden.device, requires_grad=True)
        leaves = _Leaves.apply(anchor, hidden.detach(), shapes, deliver)
        for tap, pair in zip(taps, zip(leaves[::2], leaves[1::2], strict=True), strict=True):
            setattr(tap.linear, _LEAVES, pair)
        return forward(hidden, *args, **kwargs)

    if taps:
        wrap_forward(layer, call)


class _Leaves(torch.autograd.Function):
    """Tensors of these shapes without memory, whose gradients are handed out together."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, like: Tensor, shapes: list[tuple[int, int]], deliver: Any) -> tuple[Any, ...]:
        ctx.set_materialize_grads(False)
        ctx.deliver = deliver
        return tuple(like.new_zeros(()).expand(shape) for shape in shapes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None, None, None]:
        ctx.deliver(list(gradients))
        return None, None, None, None


def tapped(linear: nn.Module) -> None:
    """Let a linear of Hugging Face take its product from ``product``."""

    def forward(x: Tensor) -> Tensor:
        return product(linear, x, linear.weight, linear.bias)  # type: ignore[arg-type]

    linear.forward = forward
    setattr(linear, _LEAVES, None)


def product(linear: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x times ``weight``, ``linear``'s or a part of it, plus ``bias``; the weight's gradient is left to taps if any."""
    leaves = getattr(linear, _LEAVES, None)
    if leaves is None or not torch.is_grad_enabled():
        return _product(linear, x, weight, bias)
    # x is kept before the product runs: where it is computed again for the backward, the last product need not be
    held = _HoldInput.apply(x.detach(), leaves[0])
    return _HoldGradient.apply(_product(linear, x, weight.detach(), bias), held, leaves[1])


def _product(linear: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if multiplies_in_float8(linear):
        out = float8_product(linear, x, weight)
        return out if bias is None else out + bias
    return F.linear(x, weight.t() if isinstance(linear, Conv1D) else weight, bias)


class _HoldInput(torch.autograd.Function):
    """Nothing (a scalar), whose backward gives the leaf x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        return None, x.flatten(0, -2)


class _HoldGradient(torch.autograd.Function):
    """y, whose backward gives the leaf its gradient too."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, held: Tensor, leaf: Tensor) -> Tensor:
        # torch 2.11 loses the gradient, in silence, where a compiled function returns a view
        return y.clone() if torch.compiler.is_compiling() else y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return dy, dy.new_zeros(()), dy.flatten(0, -2)


def add_product(total_MN: Tensor, left_TM: Tensor, right_TN: Tensor) -> None:
    """``total += leftᵀ @ right``; in another dtype by slices of rows, so that no second matrix of its size exists."""
    if total_MN.dtype == left_TM.dtype:
        total_MN.addmm_(left_TM.t(), right_TN)
        return
    for total, left in zip(total_MN.split(SLICE_ROWS), left_TM.split(SLICE_ROWS, dim=1), strict=True):
        total.add_(left.t() @ right_TN)
