"""Ranks that are threads of one process: what a proof on one process cuts a model between."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PATIENCE_S = 120.0


class Lockstep:
    """``size`` threads that meet at every collective; each gets its own copy of what all brought."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._barrier = threading.Barrier(size, timeout=PATIENCE_S)
        self._brought: list[Tensor | None] = [None] * size

    def all_gather(self, x: Tensor, rank: int) -> Tensor:
        """[...] → [size, ...] of every rank."""
        self._brought[rank] = x.detach()
        self._barrier.wait()
        gathered = torch.stack([part for part in self._brought if part is not None])
        self._barrier.wait()
        return gathered

    def run(self, work: Callable[[int], T]) -> list[T]:
        """``work`` of every rank, at once; raises what the first that failed raised."""
        results: dict[int, T] = {}
        failures: list[Exception] = []

        def rank(index: int) -> None:
            try:
                results[index] = work(index)
            except Exception as failure:  # of any kind: a foreign model runs there
                failures.append(failure)
                self._barrier.abort()

        threads = [threading.Thread(target=rank, args=(index,)) for index in range(self._size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        causes = [failure for failure in failures if not isinstance(failure, threading.BrokenBarrierError)]
        if failures:
            raise (causes or failures)[0]
        return [results[index] for index in range(self._size)]
