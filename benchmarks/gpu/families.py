"""Part ``families``: models of other kinds at sizes that people train, on one device.

A step's time and memory, predicted from a profile made in the same run and measured; then how fast Galvatron is beside
transformers' own loop, plain and with compiled layers, in turns.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import predictions
from .children import Child, Clock, CutShortError, Row
from .peers import OURS, race
from .sizes import TINY, Device, Work

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
    while works:
        model_clock = Clock.of(clock.left_s / len(works))
        work = works.pop(0)
        try:
            for row in _of_one(work, device, model_clock):
                yield {"model": work.model, **row}
        except CutShortError as cut:
            yield {"model": work.model, "skipped": str(cut)}


def _of_one(work: Work, device: Device, clock: Clock) -> Iterator[Row]:
    yield {"samples": work.global_batch_size}
    cases: predictions.Cases = ((device.is_gpu, NO_RECOMPUTE, 1),)
    with Child(predictions.measure, device, work, cases, Clock.of(clock.left_s / 2), start=device.start) as child:
        yield from child.rows(clock)
    yield from race(work, (OURS, *PEERS), device, clock, made_at_once=device.is_large)
