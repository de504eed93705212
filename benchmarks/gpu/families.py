"""Part ``families``: models of other kinds at sizes that people train, on one device.

A step's time and memory, predicted from a profile made in the same run and measured; then how fast Galvatron is beside
transformers' own loop, plain and with compiled layers, in turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch

from galvatron.models import build_spec
from galvatron.parallelize.layers.compile import compiles

from . import predictions
from .children import Child, Clock, CutShortError, Row, rows_of_all
from .peers import OURS, race
from .sizes import TINY, Device, Work, config_of

WORKS = (
    Work("BERT", 64, 512, 32),
    Work("Qwen3-MoE", 4, 4096, 2),
    Work("ViT", 256, 197, 128),
    Work("T5", 16, 512, 8),
    Work("CLIP", 128, 77, 128),
    Work("LLaVA", 4, 2048, 2),
    Work("Gemma 2", 4, 4096, 2),
)
TINY_WORKS = (Work(TINY + "BERT", 4, 32, 2), Work(TINY + "CLIP", 4, 16, 4))
PEERS = ("plain", "compiled layers")
NO_RECOMPUTE = (("none", "none"),)


def run(device: Device, clock: Clock) -> Iterator[Row]:
    """Rows of ``predictions`` and of ``peers``, each with its model's name; what fails ends its own model alone."""
    works = list(WORKS if device.is_gpu else TINY_WORKS)
    if device.is_gpu:
        _compile_at_once(works, device, Clock.of(clock.left_s / 3))
    while works:
        model_clock = Clock.of(clock.left_s / len(works))
        work = works.pop(0)
        yield {"model": work.model, "samples": work.global_batch_size}
        for part in (_predicted, _raced):
            try:
                for row in part(work, device, model_clock):
                    yield {**row, "model": work.model}
            except CutShortError as cut:
                yield {"model": work.model, "skipped": str(cut)}


def _compile_at_once(works: list[Work], device: Device, clock: Clock) -> None:
    """What compiles for seconds each, on all cores, before anything is timed; what fails here will fail there."""
    with ExitStack() as stack:
        made = [stack.enter_context(Child(predictions.compile_once, device, w, start=device.start)) for w in works]
        for _ in rows_of_all(made, clock):
            pass


def _predicted(work: Work, device: Device, clock: Clock) -> Iterator[Row]:
    compiled = compiles(None, torch.device(device.type), build_spec(config_of(work.model)))
    cases: predictions.Cases = ((compiled, NO_RECOMPUTE, 1),)
    with Child(predictions.measure, device, work, cases, clock, start=device.start) as child:
        yield from child.rows(Clock.of(clock.left_s / 2))


def _raced(work: Work, device: Device, clock: Clock) -> Iterator[Row]:
    return race(work, (OURS, *PEERS), device, clock, made_at_once=device.is_large)
