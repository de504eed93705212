"""In which order a stage runs the forward and backward passes of its microbatches."""

from __future__ import annotations

from typing import Literal, NamedTuple

from .plan import Schedule


class Action(NamedTuple):
    """One pass of one microbatch on one stage."""

    kind: Literal["forward", "backward"]
    microbatch: int


def actions(schedule: Schedule, pp: int, stage: int, num_microbatches: int) -> list[Action]:
    """The passes of ``stage``, in order.

    GPipe: all forwards, then all backwards.  1F1B (PipeDream-flush, Narayanan et al. 2021): warm up with as
    many forwards as stages follow, then one forward and one backward in turn, then drain.  Fewer microbatches
    than stages are allowed.
    """
    forwards = [Action("forward", i) for i in range(num_microbatches)]
    backwards = [Action("backward", i) for i in range(num_microbatches)]
    warmup = num_microbatches if schedule == "gpipe" else min(pp - stage - 1, num_microbatches)
    steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
    return forwards[:warmup] + steady + backwards[num_microbatches - warmup :]
