"""What stands around a module's own forward: another layout, its own places, a stage's entry, recompute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..processes.collectives import AxisGroup, batch_to_sequence, sequence_to_batch


def enter_with_layout(module: nn.Module, axes: AxisGroup, previous: int, degree: int) -> None:
    """Let ``module`` take hidden states cut ``previous`` ways along the sequence and see them cut ``degree`` ways."""
    if previous != degree:
        change = partial(change_layout, axes=axes, previous=previous, degree=degree)
        wrap_forward(module, lambda forward, hidden, *args, **kwargs: forward(change(hidden), *args, **kwargs))


def change_layout(hidden: Tensor, axes: AxisGroup, previous: int, degree: int) -> Tensor:
    """Hidden states cut ``previous`` ways along the sequence → ``degree`` ways; ``axes`` are those that change."""
    if previous == degree:
        return hidden
    return batch_to_sequence(hidden, axes) if degree > previous else sequence_to_batch(hidden, axes)


def wrap_forward(module: nn.Module, call: Callable[..., Any]) -> None:
    """Put ``call(forward, *args, **kwargs)`` in the place of ``module``'s forward; FSDP2's hooks stay outside."""
    module.forward = partial(call, module.forward)
