"""Data parallelism where nothing is sharded: flat buffers, and one all-reduce a unit beside the backward.

A unit's N elements on this rank, of which the first T are trained:

* ``master``, float32 [N]: what the optimizer updates; LocalParameters are views of it;
* a copy in the compute dtype where that differs, made once a step: the module's parameters are views of it;
* the gradient, float32 [T]: every microbatch adds to it as soon as autograd brings a parameter's.

The last gradient of the last microbatch starts the sum over the replicas, after the message to the previous stage if
the unit sends one; who reads gradients waits for it.
Losses are shares of the global loss, so it is a plain sum.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

_SLOT = "_galvatron_gradient_slot"  # the attribute of a module's parameter that leads to its slot


class GradientSlot:
    """Where the gradient of one trained parameter goes, for those who bring it past autograd.

    Attributes:
        local: the float32 parameter to optimise; ``local.grad`` is its gradient once a step is finished.
    """

    def __init__(self, unit: UnshardedUnit, local: nn.Parameter, gradient: Tensor, *, is_tied: bool) -> None:
        self.local = local
        # a parameter's hook leads here, and the garbage collector does not see what hooks lead to
        self._unit = weakref.ref(unit)
        self._gradient, self._is_tied, self._is_filled = gradient, is_tied, False

    def add(self, gradient: Tensor) -> None:
        """Add ``gradient``, of the parameter's shape and any dtype."""
        if self._is_filled:
            self._gradient.add_(gradient)
        else:
            self._gradient.copy_(gradient)
            self._is_filled = True

    def accumulator(self) -> Tensor:
        """The float32 gradient of the parameter's shape so far, to be added to in place."""
        if not self._is_filled:
            self._gradient.zero_()
            self._is_filled = True
        return self._gradient

    def arrived(self, *, from_autograd: bool = False) -> None:
        """This backward brings no more for this parameter, unless it is tied: then autograd brings the other part."""
        unit = self._unit()
        if unit is not None and (from_autograd or not self._is_tied):
            unit.count_arrival()

    def begin(self) -> None:
        """A step begins: from zero, or from what ``local.grad`` shows."""
        left = self.local.grad
        self._is_filled = left is not None
        if left is not None and left is not self._gradient:
            self._gradient.copy_(left)

    def finish(self) -> None:
        """Show the gradient; what no loss depends on has a gradient of zero."""
        self.local.grad = self.accumulator()


def gradient_slot(parameter: Tensor) -> GradientSlot | None:
    """Where the gradient of a module's parameter goes; None where FSDP2 holds it or nothing trains it."""
    return getattr(parameter, _SLOT, None)


class UnshardedUnit:
    """Parameters that live and are summed together, whole on every rank of ``replicas`` (None where there is one)."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        dtype: torch.dtype,
        reduce_dtype: torch.dtype,
        device: torch.device,
        replicas: dist.ProcessGroup | None,
        apart: Iterable[nn.Module] = (),
    ) -> None:
        """Give the parameters of ``modules`` (on meta) memory on ``device``; their values are still to be filled in.

        But for those of the modules ``apart`` within them.
        """
        places = _places(modules, apart)
        # frozen ones last; then by the power of two that divides their size, so that all start where kernels like it
        order = sorted(places, key=lambda p: (not p.requires_grad, -(p.numel() & -p.numel())))
        trained = sum(p.numel() for p in order if p.requires_grad)
        self.master = torch.empty(sum(p.numel() for p in order), device=device)
        self._compute = self.master if dtype == torch.float32 else torch.empty_like(self.master, dtype=dtype)
        self._gradient = torch.empty(trained, device=device)
        self._reduce_dtype, self._replicas = reduce_dtype, replicas
        self._slots: list[GradientSlot] = []
        self._locals: dict[nn.Parameter, nn.Parameter] = {}
        self._arrivals, self._awaited = 0, -1
        self._sum: tuple[dist.Work, Tensor] | None = None
        start = 0
        for parameter in order:
            self._place(parameter, places[parameter], start)
            start += parameter.numel()

    def _place(self, meta: nn.Parameter, places: list[tuple[nn.Module, str]], start: int) -> None:
        box = slice(start, start + meta.numel())
        local = nn.Parameter(self.master[box].view(meta.shape), requires_grad=meta.requires_grad)
        own = nn.Parameter(self._compute[box].view(meta.shape), requires_grad=meta.requires_grad)
        for module, name in places:
            setattr(module, name, own)
        self._locals[own] = local
        if own.requires_grad:
            slot = GradientSlot(self, local, self._gradient[box].view(meta.shape), is_tied=len(places) > 1)
            self._slots.append(slot)
            setattr(own, _SLOT, slot)
            own.register_post_accumulate_grad_hook(partial(_take, slot))

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether a module's ``parameter`` is one of these."""
        return parameter in self._locals

    def local(self, parameter: nn.Parameter) -> nn.Parameter:
        """The float32 parameter to optimise behind a module's ``parameter``."""
        return self._locals[parameter]

    def rounds(self, local: nn.Parameter) -> bool:
        """Whether ``local`` is one of those to optimise, and the sum over replicas rounds its gradient."""
        is_rounded = self._replicas is not None and self._reduce_dtype != torch.float32
        return is_rounded and any(local is own for own in self._locals.values())

    def refresh(self) -> None:
        """Let the modules see the current values; before the first forward of a step or an evaluation."""
        if self._compute is not self.master:
            self._compute.copy_(self.master)

    def begin(self) -> None:
        """A step begins."""
        for slot in self._slots:
            slot.begin()

    def before_backward(self, *, is_last: bool, sends_back: bool = False) -> None:
        """A microbatch's backward begins.

        Args:
            is_last: of this step's last one.
            sends_back: the gradient of the unit's input is a message, which leaves first and counts as an arrival.
        """
        self._arrivals, self._awaited = 0, len(self._slots) + sends_back if is_last else -1

    def count_arrival(self) -> None:
        """One more parameter has its gradient of this backward; the last one of the last backward starts the sum."""
        self._arrivals += 1
        if self._arrivals == self._awaited:
            self._start_sum()

    def finish(self) -> None:
        """Wait for the sum over replicas and show every parameter's gradient."""
        for slot in self._slots:
            slot.finish()
        if self._sum is None:  # some parameter had no gradient
            self._start_sum()
        if self._sum is not None:
            work, total = self._sum
            work.wait()
            self._sum = None
            if total is not self._gradient:
                self._gradient.copy_(total)

    def _start_sum(self) -> None:
        if self._replicas is None or not self._slots:
            return
        total = self._gradient
        if self._reduce_dtype != torch.float32:
            # no backward needs the copy of the weights any more, and the next step makes it anew
            is_free = self._compute.dtype == self._reduce_dtype
            total = self._compute[: len(total)] if is_free else torch.empty_like(total, dtype=self._reduce_dtype)
            total.copy_(self._gradient)
        work = dist.all_reduce(total, group=self._replicas, async_op=True)
        assert work is not None
        self._sum = work, total

    def buffers(self) -> list[Tensor]:
        """What it holds beside ``master``, for those who count memory."""
        return [self._gradient] if self._compute is self.master else [self._gradient, self._compute]


def _take(slot: GradientSlot, parameter: Tensor) -> None:
    """Move what autograd has left at a module's ``parameter`` to its slot."""
    if parameter.grad is None:
        return  # brought past autograd, which calls for that too
    slot.add(parameter.grad)
    parameter.grad = None
    slot.arrived(from_autograd=True)


def _places(
    modules: Iterable[nn.Module], apart: Iterable[nn.Module]
) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Every parameter with the attributes that hold it: several where it is tied."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    left_out = {inner for outer in apart for inner in outer.modules()}
    for module in dict.fromkeys(inner for outer in modules for inner in outer.modules() if inner not in left_out):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(parameter, []).append((module, name))
    return places
