"""This rank's gradients from one step to the next: begun anew or added to, collected, scaled, clipped.

Takes the local parameters and who shares them; knows nothing of models, batches or schedules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from galvatron.core.errors import ConfigError
from galvatron.internals import local_part, multiply_all_

from .losses.scale import LossScale
from .sharding.gradients import clip, global_norm, sum_over
from .sharding.unsharded import UnshardedUnit
from .state.pieces import LocalParameter, box, by_copies


@dataclass(frozen=True)
class Replicated:
    """Parameters whose partial gradients are summed over a group after the last backward.

    ``cut``: of these the pieces that have as many copies as the group has ranks, alone.
    """

    group: dist.ProcessGroup
    parameters: tuple[LocalParameter, ...]
    cut: tuple[LocalParameter, ...] = ()

    def gradients(self) -> list[Tensor]:
        """What is summed: views."""
        views = (view for p in self.cut if p.tensor.grad is not None for view in by_copies(p, p.tensor.grad))
        return _there(self.parameters) + [view for copies, view in views if copies == self.group.size()]


class Gradients:
    """The gradients of ``parameters``, some of which FSDP2 holds as ``shards``.

    Attributes:
        loss_scale: under fp16, what the loss of the next step is multiplied by.
        carried: what the gradients that there are were multiplied by.
    """

    def __init__(
        self,
        parameters: Sequence[LocalParameter],
        shards: Mapping[str, nn.Parameter],
        replicated: Sequence[Replicated],
        unsharded: Sequence[UnshardedUnit],
        loss_scale: LossScale | None,
        device: torch.device,
    ) -> None:
        """``shards`` maps names to the FSDP2 parameters behind some of ``parameters``; ``unsharded`` holds others."""
        self._parameters, self._shards, self._replicated, self._unsharded = parameters, shards, replicated, unsharded
        self.loss_scale, self.carried, self._device = loss_scale, 1.0, device
        self._rounded = [p for p in parameters if any(unit.rounds(p.tensor) for unit in unsharded)]
        self._earlier: dict[str, Tensor | None] = {}

    def zero(self) -> None:
        """Forget all of them."""
        for parameter in self._parameters:
            parameter.tensor.grad = None
        self._zero_shards()
        self.carried = 1.0

    def check(self, *, accumulate: bool) -> None:
        """Raise ConfigError if the coming step would begin anew over gradients that still carry the loss scale."""
        if not accumulate and self.carried != 1.0:
            raise ConfigError(
                f"the last step's gradients still carry fp16's loss scale of {self.carried:.0f}; call the model's "
                "clip_grad_norm_(max_norm), or clip_grad_norm_(None), before every update, or zero_grad() to drop them"
            )

    def begin(self, *, accumulate: bool) -> None:
        """Forget gradients, or let those of unsharded parameters stay where they are and keep the others to add.

        The others are shards, and what the sum over replicas would round once more.
        """
        if not accumulate:
            self.zero()
        self._carry()
        held = (p for p in self._parameters if p.name in self._shards)
        self._earlier = {parameter.name: parameter.tensor.grad for parameter in held}
        for parameter in self._rounded:
            if parameter.tensor.grad is not None:
                self._earlier[parameter.name] = parameter.tensor.grad.clone()
                parameter.tensor.grad = None
        self._zero_shards()
        for parameter in self._parameters:
            if parameter.name not in self._shards:
                _count_once(parameter)
        for unit in self._unsharded:
            unit.begin()

    def end(self) -> None:
        """After the last backward: point the local tensors at what units left, sum what they do not know to be
        replicated, and add what there was before.
        """
        for parameter in self._parameters:
            if parameter.name in self._shards and parameter.tensor.requires_grad:
                gradient = self._shards[parameter.name].grad
                assert gradient is None or isinstance(gradient, DTensor), parameter.name
                # none where the loss does not depend on it (a tower's last layer in LLaVA): zero, as where units sum it
                parameter.tensor.grad = torch.zeros_like(parameter.tensor) if gradient is None else local_part(gradient)
        for replicated in self._replicated:
            if gradients := replicated.gradients():
                sum_over(replicated.group, gradients)
        for parameter in self._parameters:
            before = self._earlier.get(parameter.name)
            if before is not None and parameter.tensor.grad is not None:
                parameter.tensor.grad.add_(before)
        self._earlier = {}

    def norm(self) -> Tensor:
        """Their global norm, without the loss scale that they may carry: a float32 scalar."""
        return global_norm(self._parameters, self._device) / self.carried

    def clip(self, max_norm: float | None) -> Tensor:
        """The global norm, before they are scaled down to ``max_norm`` if it is given; a float32 scalar.

        Takes the loss scale out and moves it; where gradients overflowed there are none afterwards.
        """
        norm = self.norm()
        if max_norm is not None or self.carried != 1.0:
            clip(self._parameters, norm, max_norm, self.carried)
        self.carried = 1.0
        if self.loss_scale is not None:
            finite = math.isfinite(norm)
            self.loss_scale = self.loss_scale.after(finite=finite)
            if not finite:
                self.zero()
        return norm

    def _carry(self) -> None:
        """Multiply what gradients there are by the coming step's loss scale."""
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        kept = _there(self._parameters)
        if kept and self.carried != scale:
            multiply_all_(kept, torch.tensor(scale / self.carried, device=self._device))
        self.carried = scale

    def _zero_shards(self) -> None:
        for shard in self._shards.values():
            shard.grad = None


def _count_once(parameter: LocalParameter) -> None:
    """Of a gradient that stays, leave what this rank has first: all who hold it sum it once more."""
    if (gradient := parameter.tensor.grad) is None:
        return
    if not parameter.is_primary:
        gradient.zero_()
    for piece in parameter.pieces:
        if not piece.is_first:
            box(gradient, piece.local_offset, piece.size).zero_()


def _there(parameters: Iterable[LocalParameter]) -> list[Tensor]:
    return [parameter.tensor.grad for parameter in parameters if parameter.tensor.grad is not None]
