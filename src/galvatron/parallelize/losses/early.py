"""A gradient that is there before its backward: of the weight of a loss that makes it in the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sharding.unsharded import GradientSlot, gradient_slot


class EarlyGradient:
    """The weight's gradient from forward passes whose backward has yet to come: one float32 sum, however many wait.

    Where nothing shards the weight it is the gradient itself.

    ``in_every_pass``: give zeros where the sum still waits, not nothing.  FSDP2 adds up over
    microbatches what replicas will reduce, and under ZeRO 1 what is reduced in another dtype; it needs the same
    parameters in each of them.
    """

    def __init__(self) -> None:
        self.in_every_pass = False
        self._total: Tensor | None = None
        self._waiting = 0
        self._slot: GradientSlot | None = None

    def tensors(self) -> list[Tensor]:
        """The sum, while there is one: for those who count memory."""
        return [] if self._total is None else [self._total]

    def opened(self, weight: Tensor) -> Tensor:
        """The sum for another forward pass to add to."""
        self._slot = gradient_slot(weight)
        if self._slot is not None:
            return self._slot.accumulator()
        if self._total is None:
            self._total = torch.zeros_like(weight, dtype=torch.float32)
        self._waiting += 1
        return self._total

    def closed(self, dtype: torch.dtype) -> Tensor | None:
        """For a backward pass: the whole sum in ``dtype`` if it is the last that waits, else nothing or zeros."""
        if self._slot is not None:
            self._slot.arrived()
            return None
        self._waiting -= 1
        total = self._total
        if total is None:
            return None
        if self._waiting:
            return torch.zeros_like(total, dtype=dtype) if self.in_every_pass else None
        self._total = None
        return total.to(dtype)

    def forget(self) -> None:
        """Drop what an interrupted step left."""
        self._total, self._waiting = None, 0
