"""Parts ``peers``: how fast Galvatron trains a model beside other ways, in turns on one device.

Every contender is a process of its own (liger patches transformers for all of it; what fails, fails alone) and keeps no
memory between its turns.  A turn: memory, one step to settle, some timed steps.  The first round also compiles, after
which it says what fits; the order of later rounds changes, so that none always follows the same one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import torch

from galvatron.estimate.devices import find_preset
from galvatron.models import build_spec
from galvatron.profile.timing import synchronize

from .children import Child, Clock, CutShortError, Row, reason_of
from .contenders import Contender, Parking, make, missing, rungs
from .sizes import Device, Work, config_of

OURS = "galvatron"
NAMES = (OURS, "liger", "plain", "liger, compiled layers", "accelerate", "compiled")
"""In the order of their first turn: what is compiled whole comes last, for it may take the seconds that are left."""
TURN, PREPARE = "turn", "prepare"
ROUNDS, STEPS = 4, 3
SETTLING = 2
"""Untimed steps of a first turn, after which nothing is compiled any more."""


def run(model: str, device: Device, clock: Clock) -> Iterator[Row]:
    """See ``race``; every contender is made in its first turn."""
    return race(work_for(model, device), NAMES, device, clock)


def race(
    work: Work, names: Sequence[str], device: Device, clock: Clock, *, made_at_once: bool = False
) -> Iterator[Row]:
    """A row a turn, and before them one with what the model counts.

    ``made_at_once``: before the first turn, which saves time where memory holds all of them.
    """
    yield about(work, device)
    with ExitStack() as stack:
        children: dict[str, Child] = {}
        for name in names:
            reason = missing(name, device)
            if reason is not None:
                yield {"contender": name, "skipped": reason}
            else:
                children[name] = stack.enter_context(Child(serve, name, work, device, start=device.start))
        if made_at_once:
            for child in children.values():
                child.send(PREPARE)
            for name, child in list(children.items()):
                row = _answer(child, clock.left_s)
                if "skipped" in row:
                    yield {"contender": name, **row}
                    children.pop(name).close()
        later_s = 0.0  # what two more rounds of those that have run will take
        for turn in range(ROUNDS if device.is_gpu else 2):
            if not children:
                return
            order = list(children)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                if turn > 0 and clock.left_s <= 0:
                    return
                row = _turn(children[name], clock.left_s - (later_s if turn == 0 else 0.0))
                yield {"contender": name, "round": turn, **row}
                if "skipped" in row:
                    children.pop(name).close()
                elif turn == 0:
                    later_s += 2 * (2 * sum(row["step_times_s"]) + 0.5)


def work_for(model: str, device: Device) -> Work:
    if not device.is_gpu:
        return Work("tiny", 4, 64, 2)
    largest = {"1.2B": 2, "3B": 1}[model]
    return Work(model, 4, 4096, 2 * largest if device.is_large else largest)


def about(work: Work, device: Device) -> Row:
    """``causal_flops_per_token``: products and attention, half of what it takes unmasked where it is causal."""
    spec, preset = build_spec(config_of(work.model)), find_preset(device.name)
    causal = [kind for kind in spec.layers if kind.causal]
    attention = sum(3.0 * kind.count * kind.attention_flops_per_token(work.seq_len) for kind in causal)
    return {
        "model": work.model,
        "tokens": work.tokens,
        "seq_len": work.seq_len,
        "causal_flops_per_token": spec.flops_per_token(work.seq_len) - attention / 2,
        "peak_flops_per_s": preset.peak_flops_per_s("bf16") if preset and device.is_gpu else None,
    }


def _turn(child: Child, seconds: float) -> Row:
    """One turn; a contender that fails or finds no time takes no further part."""
    if seconds <= 0:
        return {"skipped": "no time left"}
    try:
        child.send(TURN)
    except CutShortError as cut:
        return {"skipped": str(cut)}
    return _answer(child, seconds)


def _answer(child: Child, seconds: float) -> Row:
    try:
        return child.receive(seconds) or {"skipped": "the process has ended"}
    except CutShortError as cut:
        return {"skipped": str(cut)}


def serve(connection: Connection, name: str, work: Work, device: Device) -> None:
    """Takes turns until the connection closes; before the first it may be told to prepare for it."""
    place = torch.device(device.type)
    if not device.is_gpu:
        torch.set_num_threads(1)
    taken: tuple[Contender, str] | None = None
    while True:
        try:
            command = connection.recv()
        except EOFError:
            return
        if taken is None:
            start = time.perf_counter()
            taken, prepared_s = _first_that_fits(name, work, place), time.perf_counter() - start
            parking = Parking(taken[0])
        else:
            parking.unpark()
        contender, runs = taken
        row = _timed(contender, work, place) if command == TURN else {}
        parking.park()
        if place.type == "cuda":
            torch.cuda.empty_cache()
        connection.send({"runs": runs, "prepared_s": prepared_s, **row})


def _first_that_fits(name: str, work: Work, place: torch.device) -> tuple[Contender, str]:
    for size, recompute in rungs(name, work):
        try:
            contender = make(name, work, size, recompute, place)
            for _ in range(SETTLING):
                contender.step(work.batch())
            return contender, f"micro batch {size}" + ("" if recompute == "none" else f", recompute {recompute}")
        except torch.OutOfMemoryError as error:
            reason = reason_of(error)
            contender = None  # type: ignore[assignment]
        gc.collect()
        torch.cuda.empty_cache()
    raise torch.OutOfMemoryError(f"{name}: {reason}")


def _timed(contender: Contender, work: Work, place: torch.device) -> dict[str, Any]:
    """Seconds of every timed step and the most memory of tensors in them."""
    batch = work.batch()
    contender.step(batch)
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    seconds = []
    for _ in range(STEPS):
        synchronize(place)
        start = time.perf_counter()
        contender.step(batch)
        synchronize(place)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(place) if place.type == "cuda" else None
    return {"step_times_s": seconds, "peak_tensor_bytes": peak}
