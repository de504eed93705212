"""How long one unit's forward and backward take at one tensor-parallel shape and growing batches.

Takes a unit's shape and a world; gives ComputeSamples, equal on all ranks.  Knows nothing of communication.

What a sample includes: the unit run by the runtime's own code on one rank's shapes, hidden states entering and
leaving cut [B, S/tp, H]; the local copies that gathering and scattering make; the accumulation of whole gradients
from microbatch to microbatch.  What it leaves out: everything that other ranks take part in, and FSDP2 (its hooks, its
gathering and reducing of parameters).  What recompute adds to a layer's backward is measured beside it.  All ranks of
the world run at once, because ranks of one machine share its cores and memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron.core.model import ENDS, Precision, Recompute
from galvatron.core.model_profile import ComputeSample
from galvatron.parallelize.processes.world import World
from galvatron.parallelize.sharding.fsdp import DTYPES
from galvatron.parallelize.sharding.unsharded import UnshardedUnit

from .device_memory import allocator_slack, attention_backend, fitting
from .local import INITIAL_STD, LocalUnit
from .timing import Budget, agree, synchronize
from .units import UnitShape

ALWAYS_MEASURED = 2  # batches 1 and 2, so that a slope is known however small the budget
MIN_REPEATS, MAX_REPEATS = 2, 3  # of one sweep
# Passes run several times between two looks at the clock, as layers do in a step: on CPU long enough to span the
# scheduler's time slices where ranks outnumber cores, on CUDA so that launches run ahead of the device.
BURST_S = {"cpu": 40e-3, "cuda": 60e-3}
MAX_BURST = {"cpu": 16, "cuda": 8}
MICROBATCHES = 2  # of the step in small that shows the allocator's slack: the second meets what the first has left


@dataclass(frozen=True)
class Measured:
    """A unit's samples, and what the allocator reserved beyond its tensors, as a part of them (on CUDA, of layers)."""

    samples: list[ComputeSample]
    slack_fraction: float | None


def measure_unit(shape: UnitShape, precision: Precision, world: World, max_batch: int, budget: Budget) -> Measured:
    """Collective: medians of the slowest rank at batches 1, 2, 4 … ``max_batch``.

    Stops early where the next batch would overrun its share of the budget or does not fit in the device's memory;
    batches 1 and 2 are measured whatever they take.  What compiling takes is not the budget's.
    """
    start, share_s, samples = time.perf_counter(), budget.next_share(), list[ComputeSample]()
    unit = _runnable(shape, precision, world)
    for batch in _batches(max_batch):
        spent_s, share_s = agree([time.perf_counter() - start, share_s], world.device)
        expected_s = 2 * _once_s(samples[-1]) if samples else 0.0
        room = (share_s - spent_s) / expected_s if expected_s else MAX_REPEATS
        if batch > ALWAYS_MEASURED and room < MIN_REPEATS + 2:
            break
        if shape.is_compiled:
            compiled_s = _compile(unit, shape, batch, world.device)
            budget.leave_out(compiled_s)
            start += compiled_s
        seconds = _seconds(unit, shape, batch, world, int(room) - 2)
        if seconds is None:
            break
        forward_s, backward_s = seconds["none"]
        again_s = {level: max(s - backward_s, 0.0) for level, (_, s) in seconds.items() if level != "none"}
        samples.append(
            ComputeSample(
                unit=shape.name,
                tp=shape.tp,
                batch=batch,
                seq_len=shape.seq_len,
                forward_s=forward_s,
                backward_s=backward_s,
                again_s=again_s,
            )
        )
    return Measured(samples, _slack(unit, shape, samples[-1].batch, world) if samples else None)


def measure_attention(shape: UnitShape, precision: Precision, world: World) -> str:
    """The backend of attention that layers of ``shape`` run on, by an eager forward of one sequence."""
    eager = replace(shape, compiled=False)
    unit = _runnable(eager, precision, world)
    tokens, labels = eager.inputs(1, world.device)
    return attention_backend(lambda: unit(tokens, **labels))


def _slack(unit: LocalUnit, shape: UnitShape, batch: int, world: World) -> float | None:
    """Collective: the allocator's slack over a step in small, of as many layers as the model has or as fit."""
    if world.device.type != "cuda" or shape.name in ENDS:
        return None
    unit.recompute("none")
    tokens, labels = shape.inputs(batch, world.device)
    layers = fitting(world.device, shape.spec.num_layers, lambda: unit(tokens, **labels))

    def step() -> None:
        for _ in range(MICROBATCHES):
            _passes(unit, tokens, labels, layers, world.device)

    (slack,) = agree([allocator_slack(world.device, step)], world.device)
    return slack


def _once_s(sample: ComputeSample) -> float:
    """Seconds to run the unit once at every level of recompute."""
    again_s = sample.again_s.values()
    return (1 + len(again_s)) * (sample.forward_s + sample.backward_s) + sum(again_s)


def _batches(max_batch: int) -> Iterator[int]:
    """1, 2, 4 … and at last ``max_batch`` itself."""
    batch = 1
    while batch < max_batch:
        yield batch
        batch *= 2
    yield max_batch


def _runnable(shape: UnitShape, precision: Precision, world: World) -> LocalUnit:
    """The unit in memory, as where nothing is sharded, its gradients from the second microbatch on added up."""
    unit = shape.build()
    held = UnshardedUnit(unit.owners, DTYPES[precision], torch.float32, world.device, None)
    unit.place_inputs(DTYPES[precision], lambda tensor: tensor.to(world.device))
    with torch.no_grad():
        held.master.normal_(0, INITIAL_STD)
    held.refresh()
    return unit


def _compile(unit: LocalUnit, shape: UnitShape, batch: int, device: torch.device) -> float:
    """Seconds until every level of recompute has run once."""
    start = time.perf_counter()
    with suppress(torch.OutOfMemoryError):  # found again where ranks can agree on it
        _run_all_levels(unit, *shape.inputs(batch, device), device)
    return time.perf_counter() - start


def _run_all_levels(unit: LocalUnit, tokens: Tensor, labels: dict[str, Tensor], device: torch.device) -> float:
    """Seconds of one forward and backward, all others done."""
    for level in unit.levels:
        unit.recompute(level)
        _passes(unit, tokens, labels, 1, device)
    return sum(_passes(unit, tokens, labels, 1, device))


def _seconds(
    unit: LocalUnit, shape: UnitShape, batch: int, world: World, repeats: int
) -> dict[Recompute, tuple[float, float]] | None:
    """Collective: seconds of (forward, backward) by level of recompute; None where some rank's memory is too small.

    Levels take turns, so that what disturbs the machine disturbs all of them.
    """
    device, levels = world.device, unit.levels
    try:
        tokens, labels = shape.inputs(batch, device)
        once_s = _run_all_levels(unit, tokens, labels, device)  # without collectives, so a rank may fail alone
    except torch.OutOfMemoryError:
        once_s = float("inf")
    (once_s,) = agree([once_s], device)
    if once_s == float("inf"):
        return None
    burst = min(max(int(BURST_S[device.type] / once_s), 1), MAX_BURST[device.type])
    if device.type == "cuda":
        unit.recompute("none")  # which keeps the most
        (negative_burst,) = agree([-fitting(device, burst, lambda: unit(tokens, **labels))], device)
        burst = -int(negative_burst)
        _passes(unit, tokens, labels, burst, device)  # takes the memory for it, which is slow at first
    seconds: list[float] = []
    repeats = min(max(repeats, MIN_REPEATS), MAX_REPEATS)
    for level in levels * repeats:
        unit.recompute(level)
        dist.barrier()
        seconds += _passes(unit, tokens, labels, burst, device)
    slowest, stride = agree(seconds, device), 2 * len(levels)
    medians = [statistics.median(slowest[at::stride]) for at in range(stride)]
    return dict(zip(levels, zip(medians[::2], medians[1::2], strict=True), strict=True))


def _passes(
    unit: LocalUnit, tokens: Tensor, labels: dict[str, Tensor], burst: int, device: torch.device
) -> tuple[float, float]:
    """Seconds of one forward and of one backward of this rank, over ``burst`` forwards, then as many backwards."""
    synchronize(device)
    start = time.perf_counter()
    outputs = [unit(tokens, **labels) for _ in range(burst)]
    synchronize(device)
    middle = time.perf_counter()
    while outputs:
        output = outputs.pop()
        tokens.grad = None
        if output.requires_grad:  # not where nothing up to here is trainable
            output.backward(torch.ones_like(output))
    synchronize(device)
    end = time.perf_counter()
    return (middle - start) / burst, (end - middle) / burst
