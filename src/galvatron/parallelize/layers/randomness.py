"""What dropout draws: masks that depend on (seed, step, rank) and on nothing else that the process does.

No two ranks do the same work in layers: between regions hidden states are cut along batch and sequence, within
attention heads are cut too, and stages have different layers.  So every rank draws masks of its own there; what is
computed twice is recomputed layers alone, and ``torch.utils.checkpoint`` gives these the random state of their first
run.  Where ends see whole sequences several ranks do the same work, and draw alike (``AlikeMasks``); and within layers
of windows, whose heads draw alike on all tensor-parallel ranks too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..processes.collectives import ALONE, AxisGroup


@contextmanager
def masks_of(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Within, the generators of the CPU and of ``device`` start from (seed, step, rank); afterwards they are as before.

    The caller's own draws (of data, say, equal on all ranks) neither change the masks nor are changed by them.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _start((seed, step, rank), device)
        yield


class AlikeMasks:
    """What the generators draw where several ranks do the same work, and where they do not.

    A place of work, together with the first of the ranks that do it, has a stream of its own, which goes on from
    microbatch to microbatch; None is a rank's own.  Until ``begin`` is called there is nothing to draw.
    """

    def __init__(self) -> None:
        self._at: tuple[int, ...] | None = None
        self._kept: dict[tuple[int, ...] | None, list[Tensor]] = {}
        self._begun: tuple[tuple[int, int], int, torch.device] | None = None

    def begin(self, seed: int, step: int, rank: int, device: torch.device) -> None:
        """A step begins, within ``masks_of``."""
        self._at, self._kept, self._begun = None, {}, ((seed, step), rank, device)

    def draw_for(self, place: int | None, axes: AxisGroup = ALONE) -> None:
        """From now on draw what work at ``place`` draws on all ranks of ``axes``, consecutive ones; None: one's own."""
        if self._begun is None:
            return
        drawn, rank, device = self._begun
        to = None if place is None else (place, rank - axes.rank)
        if to == self._at:
            return
        self._kept[self._at], self._at = _states(device), to
        if to in self._kept:
            _restore(self._kept[to], device)
        elif to is not None:
            _start((*drawn, to[1], 1 + to[0]), device)


def _start(drawn: tuple[int, ...], device: torch.device) -> None:
    number = int(np.random.SeedSequence(drawn).generate_state(1)[0])
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def _states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _restore(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
