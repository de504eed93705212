"""The dynamic loss scale of fp16: gradients are made of a scaled loss, so that small ones do not vanish below 6e-8.

Takes whether a step's gradients were finite; gives the scale of the next.  Knows nothing of tensors or ranks: the scale
is part of what a token's loss counts for, so whatever the backward makes is scaled, on every stage alike.
"""

from __future__ import annotations

from pydantic import Field

from galvatron.core.numbers import Whole
from galvatron.core.records import Record

GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0, 0.5, 2000  # torch.amp.GradScaler's, as is the first scale
FIRST_SCALE, LEAST_SCALE, MOST_SCALE = 2.0**16, 1.0, 2.0**32  # the least is Megatron-LM's min_loss_scale


class LossScale(Record):
    """What the loss is multiplied by, and how many steps in a row their gradients were finite under it.

    Powers of two, so that multiplying and dividing by them rounds nothing.
    """

    scale: float = Field(default=FIRST_SCALE, strict=True, ge=LEAST_SCALE, le=MOST_SCALE)
    finite_steps: Whole = 0

    def after(self, *, finite: bool) -> LossScale:
        """The scale of the step after one whose gradients were ``finite`` or not."""
        if not finite:
            return LossScale(scale=max(self.scale * BACKOFF, LEAST_SCALE))
        if self.finite_steps + 1 < GROWTH_INTERVAL:
            return LossScale(scale=self.scale, finite_steps=self.finite_steps + 1)
        return LossScale(scale=min(self.scale * GROWTH, MOST_SCALE))

    @property
    def is_least(self) -> bool:
        """Whether a gradient that is not finite is no fault of the scale's."""
        return self.scale == LEAST_SCALE
