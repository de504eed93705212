"""Bounds that come before costs are below them, and what is costed once for many strategies is right for each."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from tests.unit.search.test_brute_force import instance

from galvatron.cost.memory import UnitMemory, all_unit_memory, unit_memory
from galvatron.cost.setting import Setting
from galvatron.cost.unit import UnitTimes, all_unit_times, unit_times
from galvatron.search.baselines import members
from galvatron.search.bounds import fastest_s, relaxed_division
from galvatron.search.job import Job
from galvatron.search.pairs import undominated_pairs
from galvatron.search.smallest import smallest
from galvatron.search.solve import UNLIMITED, parts, solve
from galvatron.search.space import Space
from galvatron.search.unbeaten import without_beaten

SEEDS = (3, 14, 21, 40)  # 14: two of five tasks have no strategy


TIED = (3, 4, 7, 8, 13, 14, 16, 25, 28, 36, 39)


def job(seed: int) -> Job:
    model, hardware, batches, _, limits, _ = instance(seed)
    setting = Setting(model, hardware, 1, 1, batches[0], model.seq_len, model.precision, "fp32")
    made = Job(setting, limits, hardware.device.memory_bytes, batches, lambda line: None)
    made.look_at_all()
    return made


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_task_is_not_below_is_told_by_its_fastest_options_alone(seed: int) -> None:
    found = job(seed)
    for i, task in enumerate(found.tasks):
        space = found.builder.build(task)
        fastest = {unit: float(options.work_s.min(initial=np.inf)) for unit, options in space.options.items()}
        assert found.least[i] * task.global_batch_size == pytest.approx(fastest_s(space.setting, fastest), rel=1e-12)
        assert np.isinf(found.least[i]) == any(not len(options) for options in space.options.values())
        assert found.builder.num_options(task) == max(map(len, space.options.values()))


def test_costs_shared_by_schedules_are_those_of_each() -> None:
    found = job(SEEDS[0])
    for space in map(found.builder.build, found.tasks):
        for unit, options in space.options.items():
            times = all_unit_times(space.setting, unit, options.strategies)
            memory = all_unit_memory(space.setting, unit, options.strategies)
            assert (options.work_s == times.work_s(space.setting)).all()
            assert (options.resident_bytes == memory.resident_bytes).all()
            assert (options.transient_bytes == memory.transient_bytes).all()
    assert {"1f1b", "zero_bubble"} <= {task.schedule for task in found.tasks}


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_costs_shared_by_strategies_of_one_cut_are_those_of_each(seed: int) -> None:
    found = job(seed)
    setting = found.builder.setting(found.tasks[-1])
    for unit in setting.model.spec.units:
        rows = found.builder.rows(setting.stage_size, unit)
        rows = rows.take(setting.micro_batch_size % rows.dp == 0)
        times, memory = all_unit_times(setting, unit, rows), all_unit_memory(setting, unit, rows)
        for i in range(0, len(rows), 7):
            alone, bytes_alone = unit_times(setting, unit, rows[i]), unit_memory(setting, unit, rows[i])
            assert all(getattr(times.row(i), f.name) == getattr(alone, f.name) for f in fields(UnitTimes))
            assert all(getattr(memory.row(i), f.name) == getattr(bytes_alone, f.name) for f in fields(UnitMemory))


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_of_options_that_are_left_out_another_is_left(seed: int) -> None:
    found = job(seed)
    for task in found.tasks[:4]:
        space = found.builder.build(task)
        for kind in space.setting.model.spec.layers:
            every, left = space.options[kind.name], without_beaten(space).options[kind.name]
            assert len(left) <= len(every)
            for i in range(len(every)):
                same = (left.layout == every.layout[i]) & (left.work_s <= every.work_s[i])
                names = ("resident_bytes", "activation_bytes", "waiting_bytes", "transient_bytes")
                less = [getattr(left, name) <= getattr(every, name)[i] for name in names]
                assert (same & np.all(less, axis=0)).any()


def spaces(seed: int) -> list[Space]:
    """Of the tasks of an instance, with a little more room than the smallest plan needs."""
    found = job(seed)
    unlimited = [found.builder.build(task, UNLIMITED) for task in found.tasks]
    least = [(space, smallest(space)) for space in unlimited]
    return [replace(space, usable_bytes=int(1.1 * plan.value)) for space, plan in least if plan is not None]


def test_what_is_said_of_all_pairs_of_tied_ends_is_what_each_says_of_itself() -> None:
    ratios = []
    for seed in TIED:
        for space in (space for space in spaces(seed) if space.task.pp > 1 and space.end_pairs is not None):
            for part in parts(without_beaten(space)):
                relaxed = relaxed_division(part.space, part.bounds.of(part.space))
                if relaxed is not None:
                    ratios.append(part.floor_s / relaxed.value)
                else:
                    assert part.floor_s > 0
    assert max(ratios) <= 1 + 1e-9
    assert np.median(ratios) > 0.99, "worth having"
    assert len(ratios) > 20


@pytest.mark.parametrize("one_layout", [False, True])
def test_no_pair_of_tied_ends_is_better_than_those_that_are_looked_at(one_layout: bool) -> None:
    left_out = alike = 0
    for seed in (8, 13, 16):
        for space in (space for space in spaces(seed) if space.task.pp > 1):
            of = space.in_layout(int(space.layer_layouts[-1])) if one_layout else space
            each = [of.restricted({"embedding": np.array([i]), "head": np.array([j])}) for i, j in of.end_pairs or ()]
            values = [plan.value for plan in (solve(one).solution for one in each) if plan is not None]
            found = solve(of).solution
            assert min(values, default=None) == (found and pytest.approx(found.value, rel=1e-9))
            left_out += len(each) - len(undominated_pairs(of))
            alike += sum(part.alike is not None for part in parts(without_beaten(of)))
    assert (left_out if one_layout else alike) > 10


def test_simple_plans_that_are_left_out_do_not_fit() -> None:
    out = 0
    for space in (space for seed in SEEDS for space in spaces(seed)[:2]):
        (kind, *others) = (kind.name for kind in space.setting.model.spec.layers)
        left = {int(member.chosen[kind][0]) for member in members(space, "uniform", 4)}
        for at in set(range(len(space.options[kind]))) - left if not others else ():
            out += 1
            assert solve(space.restricted({kind: np.array([at])})).solution is None
    assert out > 0
