"""How much compute and communication slow each other when they run together.

Takes an initialised world; gives an ``Overlap``, equal on all ranks.  Knows nothing of models.

Each side is timed alone, then beneath a longer run of the other: the slowdown of the inner one is the ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from galvatron.core.hardware import Overlap
from galvatron.parallelize.processes.world import World

from .timing import agree, seconds_of

MATMUL_SIZE = {"cpu": 256, "cuda": 4096}
MESSAGE_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}  # fp32: 1 MiB and 64 MiB, large enough that bandwidth dominates
REPEATS = 3
COVER = 2.0  # the outer side runs this many times longer than the inner one is expected to


@dataclass(frozen=True)
class _Sides:
    """The two sides; both only start work where the device works by itself."""

    device: torch.device
    compute: Callable[[], object]
    communicate: Callable[[], dist.Work]


def measure_overlap(world: World, *, budget_s: float) -> Overlap:
    """Collective: slowdowns (≥ 1) of matrix products and all-reduces over the whole world while they overlap.

    About ``budget_s`` seconds; a world of one communicates nothing and has no slowdown.
    """
    if world.world_size == 1:
        return Overlap(compute_slowdown=1.0, communication_slowdown=1.0)
    sides = _sides(world.device)
    compute_s, communicate_s = (
        _once(sides.compute, sides.device),
        _once(lambda: sides.communicate().wait(), sides.device),
    )
    window_s = max(budget_s / (REPEATS * (2 + 2 * COVER)), compute_s, communicate_s)
    computes, communications = round(window_s / compute_s) or 1, round(window_s / communicate_s) or 1
    compute_alone_s, _ = _seconds(sides, computes, 0)
    _, communicate_alone_s = _seconds(sides, 0, communications)
    compute_covered_s, _ = _seconds(sides, computes, round(COVER * communications))
    _, communicate_covered_s = _seconds(sides, round(COVER * computes), communications)
    return Overlap(
        compute_slowdown=max(compute_covered_s / compute_alone_s, 1.0),
        communication_slowdown=max(communicate_covered_s / communicate_alone_s, 1.0),
    )


def _sides(device: torch.device) -> _Sides:
    n = MATMUL_SIZE[device.type]
    matrix = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    product = torch.empty_like(matrix)
    message = torch.zeros(MESSAGE_ELEMENTS[device.type], device=device)
    return _Sides(
        device,
        lambda: torch.mm(matrix, matrix, out=product),
        lambda: dist.all_reduce(message, async_op=True),
    )


def _once(operation: Callable[[], object], device: torch.device) -> float:
    operation()
    (once_s,) = agree([seconds_of(operation, device)], device)
    return once_s


def _seconds(sides: _Sides, computes: int, communications: int) -> tuple[float, float]:
    """Seconds of all computes and of all communications started together: medians of the slowest rank's."""
    measure = _on_streams if sides.device.type == "cuda" else _on_threads
    seconds: list[float] = []
    for _ in range(REPEATS):
        dist.barrier()
        seconds += measure(sides, computes, communications)
    slowest = agree(seconds, sides.device)
    return statistics.median(slowest[::2]), statistics.median(slowest[1::2])


def _on_threads(sides: _Sides, computes: int, communications: int) -> tuple[float, float]:
    """Total seconds of either side on CPU: gloo's threads communicate while this thread computes."""
    start = time.perf_counter()
    pending = [sides.communicate() for _ in range(communications)]
    communicated_s = None
    for _ in range(computes):
        sides.compute()
        if communicated_s is None and pending and pending[-1].is_completed():
            communicated_s = time.perf_counter() - start
    computed_s = time.perf_counter() - start
    for work in pending:
        work.wait()
    return computed_s, communicated_s or time.perf_counter() - start


def _on_streams(sides: _Sides, computes: int, communications: int) -> tuple[float, float]:
    """Total seconds of either side on CUDA: one stream each, timed by events on the device."""
    side_stream = torch.cuda.Stream(sides.device)
    start, computed, communicated = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda.synchronize(sides.device)
    start.record()
    side_stream.wait_event(start)
    with torch.cuda.stream(side_stream):
        for _ in range(communications):
            sides.communicate().wait()  # makes the side stream wait, not the host
        communicated.record()
    for _ in range(computes):
        sides.compute()
    computed.record()
    torch.cuda.synchronize(sides.device)
    return start.elapsed_time(computed) / 1e3, start.elapsed_time(communicated) / 1e3
