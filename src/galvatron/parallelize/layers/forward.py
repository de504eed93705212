"""What stands around a module's own forward: another layout, its own positions, a stage's entry, recompute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..processes.collectives import AxisGroup, batch_to_sequence, sequence_to_batch


def enter_with_layout(module: nn.Module, axes: AxisGroup, previous: int, degree: int) -> None:
    """Let ``module`` take hidden states cut ``previous`` ways along the sequence and see them cut ``degree`` ways."""
    if previous == degree:
        return
    change = partial(batch_to_sequence if degree > previous else sequence_to_batch, axes=axes)
    wrap_forward(module, lambda forward, hidden, *args, **kwargs: forward(change(hidden), *args, **kwargs))


class OwnPositions:
    """Takes the positions of some layers out of rotary tables: once a forward, however many layers ask."""

    def __init__(self, spans: tuple[range, ...], device: torch.device) -> None:
        """``spans``: of all positions, those that the layers see."""
        self._positions = torch.cat([torch.arange(span.start, span.stop, device=device) for span in spans])
        self._whole: tuple[Tensor, ...] = ()
        self._own: tuple[Tensor, ...] = ()

    def enter(self, module: nn.Module) -> None:
        """Let ``module`` see the tables [..., S, D] that it is given cut down to these positions."""
        wrap_forward(module, self._call)

    def _call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tables = kwargs.pop("position_embeddings", None)
        if tables is not None:
            kwargs["position_embeddings"] = self._of(tables)
        return forward(*args, **kwargs)

    def _of(self, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if len(tables) != len(self._whole) or any(a is not b for a, b in zip(tables, self._whole, strict=True)):
            self._whole, self._own = tables, tuple(table.index_select(-2, self._positions) for table in tables)
        return self._own


def wrap_forward(module: nn.Module, call: Callable[..., Any]) -> None:
    """Put ``call(forward, *args, **kwargs)`` in the place of ``module``'s forward; FSDP2's hooks stay outside."""
    module.forward = partial(call, module.forward)
