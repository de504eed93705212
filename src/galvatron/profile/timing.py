"""Clocks that all ranks share: run together, time alone, agree on the slowest.

Takes functions; gives seconds that are the same on every rank.  Knows nothing of what it times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

Progress = Callable[[str], None]


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work; on CPU there is none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def agree(values: Sequence[float], device: torch.device) -> list[float]:
    """Collective: the elementwise maximum over all ranks."""
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(value) for value in tensor.tolist()]


def seconds_of(operation: Callable[[], object], device: torch.device, iterations: int = 1) -> float:
    """Wall seconds of one of ``iterations`` back-to-back calls on this rank."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(iterations):
        operation()
    synchronize(device)
    return (time.perf_counter() - start) / iterations


def slowest_median(operation: Callable[[], object], device: torch.device, repeats: int, iterations: int = 1) -> float:
    """Collective: the median over ``repeats`` of the slowest rank's seconds; all ranks start together."""
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        seconds.append(seconds_of(operation, device, iterations))
    return statistics.median(agree(seconds, device))


class Budget:
    """Seconds shared out over a known number of tasks; what one task leaves goes to those after it."""

    def __init__(self, seconds: float, num_tasks: int) -> None:
        self._end = time.perf_counter() + seconds
        self._tasks_left = num_tasks

    def next_share(self) -> float:
        """This rank's seconds for the next task; never negative."""
        share = self.left_s() / max(self._tasks_left, 1)
        self._tasks_left -= 1
        return max(share, 0.0)

    def left_s(self) -> float:
        """This rank's seconds left for all tasks; negative once they are over."""
        return self._end - time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Seconds of the task that shall not count."""
        self._end += seconds
