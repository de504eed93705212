"""Part ``predictions``: what plans take, against what a profile made in the same run predicts for them.

One model on one device: microbatches and modes of recompute, alone and mixed.  Time is that of whole steps with clip
and update.  Memory is the process's: on CUDA what the allocator has reserved at most and what lies outside it, on a CPU
the tensors alive at once.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch

from galvatron.core.hardware import HardwareProfile
from galvatron.core.model import RECOMPUTES, Precision, Recompute
from galvatron.core.model_profile import ModelProfile
from galvatron.cost import predict
from galvatron.models import build_spec
from galvatron.parallelize import World, init_world
from galvatron.plan import Plan
from galvatron.profile import profile_hardware, profile_model
from galvatron.profile.device_memory import cublas_bytes, outside_bytes
from galvatron.profile.timing import synchronize

from .children import Child, Clock, Row, reason_of
from .runs import one_device_plan, peak_from_now, started, train
from .sizes import Device, Work, config_of

STEPS = {"cpu": 1, "cuda": 3}
PRECISIONS: dict[str, Precision] = {"cpu": "fp32", "cuda": "bf16"}
Halves = tuple[Recompute, Recompute]
Cases = tuple[tuple[bool, tuple[Halves, ...], int], ...]
ALIKE: tuple[Halves, ...] = tuple((level, level) for level in RECOMPUTES)
MIXED: tuple[Halves, ...] = (("none", "full"), ("none", "selective"), ("selective", "full"))
"""Levels of recompute of the first and of the second half of the layers."""
SIZES = 4
"""How many sizes of microbatches are tried at most, each half of the one before."""


def run(device: Device, clock: Clock) -> Iterator[Row]:
    cases = (False, MIXED, SIZES), (device.is_gpu, ALIKE, SIZES)
    with Child(measure, device, work_for(device), cases, clock, start=device.start) as child:
        yield from child.rows(clock)


def work_for(device: Device) -> Work:
    return Work("1.2B", 4, 4096, 2) if device.is_gpu else Work("tiny", 2, 64, 1)


def plans(work: Work, precision: Precision, halves: tuple[Halves, ...], most_sizes: int) -> Iterator[Plan]:
    """Microbatches of the largest sizes with the layers' ``halves``."""
    num_layers = build_spec(config_of(work.model)).num_layers
    half = num_layers // 2
    sizes = work.sizes[:most_sizes]
    for size, (first, second) in itertools.product(sizes, halves):
        yield one_device_plan(work, size, precision, [first] * half + [second] * (num_layers - half))


def measure(connection: Connection, device: Device, work: Work, cases: Cases, clock: Clock) -> None:
    """Sends for every case a row with a profile, where it needs another, then one a plan."""
    if not device.is_gpu:
        torch.set_num_threads(1)
    world, most_s = init_world(device.type), 6.0 if device.is_gpu else 2.0
    precision = PRECISIONS[device.type]
    hardware = profile_hardware(world, budget_s=min(clock.left_s / 20, most_s / 4))
    model: ModelProfile | None = None
    for compiled, halves, most_sizes in cases:
        if clock.left_s <= 0:
            connection.send({"plan": "compiled" if compiled else "eager", "skipped": "no time left"})
            return
        if model is None or model.compiled != compiled:
            start = time.perf_counter()
            model = _profiled(work, world, min(clock.left_s / 6, most_s), compiled)
            connection.send({"profile": _about(model), "seconds": time.perf_counter() - start})
        for plan in plans(work, precision, halves, most_sizes):
            connection.send(_row(plan, work, model, hardware, world, clock))


def compile_once(connection: Connection, device: Device, work: Work) -> None:
    """Fills the cache of compiled kernels: processes that profile and train ``work`` later find theirs there."""
    _profiled(work, init_world(device.type), 0.0, None)


def _profiled(work: Work, world: World, budget_s: float, compiled: bool | None) -> ModelProfile:
    return profile_model(
        config_of(work.model),
        world,
        seq_len=work.seq_len,
        precision=PRECISIONS[world.device.type],
        max_batch=work.micro_batch_size,
        budget_s=budget_s,
        compile=compiled,
    )


def _about(model: ModelProfile) -> Row:
    noted = ("precision", "compiled", "attention_backend", "context_bytes", "allocator_slack_fraction")
    return model.model_dump(include=set(noted))


def _row(plan: Plan, work: Work, model: ModelProfile, hardware: HardwareProfile, world: World, clock: Clock) -> Row:
    about = {"plan": _words(plan, model)}
    prediction = predict(plan, model, hardware)
    if clock.left_s <= 0:
        return {**about, "skipped": "no time left"}
    if prediction.peak_memory_bytes > hardware.device.memory_bytes:
        return {**about, "skipped": f"predicted to need {prediction.peak_memory_bytes / 2**30:.1f} GiB"}
    try:
        seconds, memory_bytes, tensor_bytes = _measure(plan, work, world, compiled=model.compiled)
    except torch.OutOfMemoryError as error:
        return {**about, "skipped": reason_of(error), "predicted_memory_bytes": prediction.peak_memory_bytes}
    (stage,) = prediction.stages
    predicted_tensors = stage.peak_memory_bytes - stage.runtime_bytes
    predicted_bytes = prediction.peak_memory_bytes if world.device.type == "cuda" else predicted_tensors
    return {
        **about,
        "predicted_step_time_s": prediction.step_time_s,
        "step_times_s": seconds,
        "time_error": prediction.step_time_s / statistics.median(seconds) - 1,
        "predicted_memory_bytes": predicted_bytes,
        "memory_bytes": memory_bytes,
        "memory_error": predicted_bytes / memory_bytes - 1,
        "predicted_tensor_bytes": predicted_tensors,
        "tensor_bytes": tensor_bytes,
        "tensor_error": predicted_tensors / tensor_bytes - 1,
    }


def _words(plan: Plan, model: ModelProfile) -> str:
    modes = dict.fromkeys(layer.recompute for layer in plan.layers)
    words = f"{plan.num_microbatches} x {plan.micro_batch_size}, recompute {' and '.join(modes)}"
    return words + (", compiled" if model.compiled else ", eager")


def _measure(plan: Plan, work: Work, world: World, *, compiled: bool) -> tuple[list[float], int, int]:
    """Seconds of every step after the first; bytes of the process and of its tensors at the peak."""
    device = world.device
    model, optimizer = started(plan, world, compiled=compiled)
    memory = peak_from_now(device)
    batch = work.batch()
    seconds = []
    for _ in range(1 + STEPS[device.type]):
        synchronize(device)
        start = time.perf_counter()
        with memory.watch(model, optimizer, [*batch[0].values(), batch[1]]):
            train(model, optimizer, batch)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    outside = outside_bytes(device)
    if outside is None:
        return seconds[1:], memory.bytes(), memory.bytes()
    memory_bytes = torch.cuda.max_memory_reserved(device) + outside
    return seconds[1:], memory_bytes, memory.bytes() - cublas_bytes(device)
