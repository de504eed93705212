"""Stages whose segments are the same share what is found of them, and find what each would find alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from tests.unit.profiles import make_hardware, make_model, make_spec

from galvatron.cost.setting import Setting
from galvatron.search import tables
from galvatron.search.bounds import StageBound, first_alike, stage_bounds
from galvatron.search.job import Job
from galvatron.search.limits import Limits
from galvatron.search.smallest import smallest
from galvatron.search.solve import UNLIMITED, solve
from galvatron.search.space import Space


def spaces(seed: int) -> Iterator[Space]:
    """Of tasks of eight devices and two kinds of layers in at least four stages, with a little and with much room."""
    spec = make_spec(5, vocab=250, tied=bool(seed % 2), others=2)
    model = make_model(spec, tps=(1, 2), seed=seed)
    hardware = make_hardware(8, "cuda", seed=seed, memory_bytes=2**40)
    setting = Setting(model, hardware, 1, 1, 8, model.seq_len, model.precision, "fp32")
    made = Job(setting, Limits.parse("runtime"), hardware.device.memory_bytes, [8], lambda line: None)
    for task in made.tasks:
        if task.pp < 4 or task.model_chunks > 1:
            continue
        space = made.builder.build(task, UNLIMITED)
        least = smallest(space)
        assert least is not None
        for room in (1.05, 1.5):
            yield replace(space, usable_bytes=int(room * least.value))


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_stages_together_find_what_each_finds_alone(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(bounds: list[StageBound]) -> list[int]:
        return list(range(len(bounds)))

    shared = 0
    for space in itertools.islice(spaces(seed), 8):
        first = first_alike(stage_bounds(space))
        shared += len(first) - len(set(first))
        together = solve(space)
        with monkeypatch.context() as patch:
            patch.setattr(tables, "first_alike", alone)
            each = solve(space)
        assert (together.solution is None) == (each.solution is None)
        if together.solution is not None and each.solution is not None:
            assert together.solution.value == pytest.approx(each.solution.value, rel=1e-9)
            assert together.lower_bound_s == pytest.approx(each.lower_bound_s, rel=1e-9)
    assert shared > 2
