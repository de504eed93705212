"""What a search promises beyond the optimum: bounds, monotony, limits, determinism, rivals, clear refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest

from galvatron.core.errors import ConfigError, InfeasibleError, ProfileError
from galvatron.cost import Setting, predict
from galvatron.cost.step import objective_s
from galvatron.plan.plan import Plan, Proof
from galvatron.plan.rules import check_plan
from galvatron.search import SearchResult, search
from galvatron.search.bounds import layer_bounds_s, lower_bound_s
from galvatron.search.solve import solve
from galvatron.search.space import Task, build_space, strategies, tasks
from unit.profiles import make_hardware, make_model, make_spec

MODEL, HARDWARE = make_model(make_spec(4, hidden=256, ffn=768, vocab=2000), flops_per_s=2e11), make_hardware(4)
TIGHT = 30 * 2**20


def find(limit: int | None = TIGHT, model: Any = MODEL, hardware: Any = HARDWARE, **fixed: Any) -> SearchResult:
    return search(model, hardware, global_batch_size=8, memory_limit_bytes=limit, **fixed)


def proof_of(result: SearchResult) -> Proof:
    assert result.plan.prediction is not None
    assert result.plan.prediction.proof is not None
    return result.plan.prediction.proof


def step_s(plan: Plan | None) -> float:
    assert plan is not None
    assert plan.prediction is not None
    return plan.prediction.step_time_s


def test_a_tight_limit_gives_a_mix_that_fits_and_that_the_runtime_accepts() -> None:
    result = find()
    check_plan(result.plan, MODEL.spec, 4)
    assert result.plan.prediction is not None
    assert result.plan.prediction.peak_memory_bytes <= TIGHT
    assert len(set(result.plan.layers)) > 1
    again = predict(result.plan, MODEL, HARDWARE, TIGHT)
    assert result.plan.prediction.model_copy(update={"proof": None}) == again


def test_the_plan_survives_its_file() -> None:
    plan = find().plan
    assert Plan.from_json(plan.to_json()) == plan


def test_equal_input_gives_an_equal_plan() -> None:
    first, second = find(), find()
    assert first.plan.model_copy(update={"prediction": None}) == second.plan.model_copy(update={"prediction": None})
    assert first.candidates == second.candidates


def test_more_memory_is_never_slower() -> None:
    objectives = [proof_of(find(int(TIGHT * factor))).objective_s for factor in (0.8, 1.0, 1.3, 2.0, 8.0)]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[0] > objectives[-1]


def test_faster_links_are_never_slower() -> None:
    hardware = [make_hardware(4, bytes_per_s=rate) for rate in (1e8, 1e9, 1e10)]
    objectives = [proof_of(find(hardware=h)).objective_s for h in hardware]
    assert objectives == sorted(objectives, reverse=True)


def test_the_chosen_plan_is_the_fastest_replay_and_rivals_are_sorted() -> None:
    result = find()
    steps = [step_s(plan) for plan in (result.plan, *result.candidates)]
    assert steps == sorted(steps)
    assert all(step_s(plan) >= steps[0] for plan in result.baselines.values() if plan is not None)


def test_fixed_dimensions_are_kept() -> None:
    result = find(pp=2, num_microbatches=4, max_tp=1)
    for plan in (result.plan, *result.candidates):
        assert (plan.pp, plan.num_microbatches) == (2, 4)
        assert all(strategy.tp == 1 for strategy in plan.strategies())


def test_tied_embedding_and_head_are_cut_alike() -> None:
    tied = make_model(make_spec(4, hidden=256, ffn=768, vocab=2000, tied=True), flops_per_s=2e11)
    for fixed in ({}, {"pp": 2}):
        result = find(model=tied, **fixed)
        check_plan(result.plan, tied.spec, 4)


@pytest.mark.parametrize("seq_len", [64, 2048, 8192])  # parameters or, ever more, activations fill the memory
def test_no_bound_exceeds_its_task_s_optimum(seq_len: int) -> None:
    model = make_model(make_spec(4, hidden=256, ffn=768, vocab=300), seq_len=seq_len, flops_per_s=2e11)
    compared = 0
    for task in tasks(4, 4, 4):
        setting = Setting(model, HARDWARE, task.pp, task.num_microbatches, 4, seq_len, "fp32", "fp32")
        least = solve(build_space(task, setting, 1), aim="memory")
        for factor in (1.0, 1.05, 1.3, 2.0, 20.0) if least else ():
            assert least is not None
            space = build_space(task, setting, int(least.value * factor))
            bound, solution = lower_bound_s(space), solve(space)
            assert solution is not None
            compared += 1
            assert solution.value / 3 <= bound <= solution.value  # true, and worth having
            assert objective_s(solution.plan(space), setting) == pytest.approx(solution.value, rel=1e-12)
            for option, layer_bound in enumerate(layer_bounds_s(space)):
                alone = solve(space.restricted([option])) if factor == 1.3 else None
                assert alone is None or layer_bound <= alone.value
    assert compared > 50


def test_the_bound_of_a_deep_pipeline_counts_the_emptiest_stage() -> None:
    model = make_model(make_spec(16, hidden=64, ffn=192, vocab=30), seq_len=2048, tps=(1,), flops_per_s=2e11)
    no_workspace = {"workspace_bytes_per_sequence": 0}  # so that what is held decides
    samples = tuple(sample.model_copy(update=no_workspace) for sample in model.activations)
    model = model.model_copy(update={"activations": samples})
    task = Task(4, 16, "1f1b")
    setting = Setting(model, HARDWARE, task.pp, task.num_microbatches, 16, 2048, "fp32", "fp32")
    least = solve(build_space(task, setting, 1), aim="memory")
    assert least is not None
    for factor in (1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0):
        space = build_space(task, setting, int(least.value * factor))
        solution = solve(space)
        assert solution is not None
        assert lower_bound_s(space) <= solution.value


def test_least_memory_is_the_smallest_limit_with_a_plan() -> None:
    compared = 0
    for task in tasks(4, 4, 8):
        setting = Setting(MODEL, HARDWARE, task.pp, task.num_microbatches, 8, 64, "fp32", "fp32")
        least = solve(build_space(task, setting, 1), aim="memory")
        if least is None:
            continue
        compared += 1
        assert solve(build_space(task, setting, int(least.value))) is not None
        assert solve(build_space(task, setting, int(least.value) - 1)) is None
    assert compared > 10


def test_strategies_are_every_assignment_of_axes() -> None:
    found = list(strategies(4))
    assert len(found) == len(set(found)) == 24
    assert len(list(strategies(8))) == 44
    assert {(s.tp, s.dp_shard, s.dp_replicate) for s in strategies(6)} == {
        (1, 1, 6), (1, 2, 3), (1, 6, 1), (2, 1, 3), (2, 3, 1), (6, 1, 1)
    }  # fmt: skip


def test_tasks_leave_out_what_cannot_differ() -> None:
    found = [(t.pp, t.num_microbatches, t.schedule) for t in tasks(4, 2, 2)]
    assert found == [(1, 1, "1f1b"), (1, 2, "1f1b"), (2, 1, "1f1b"), (2, 2, "1f1b"), (2, 2, "gpipe")]


def test_too_little_memory_says_how_much_would_do() -> None:
    with pytest.raises(InfeasibleError, match=r"needs .* on stage \d, .* too much; allow \d+ MiB") as failure:
        find(4 * 2**20)
    assert failure.value.constraint.startswith("memory of stage")
    enough = re.search(r"allow (\d+) MiB", str(failure.value))
    assert enough is not None
    find(int(enough[1]) * 2**20)
    with pytest.raises(InfeasibleError):
        find((int(enough[1]) - 1) * 2**20)


def test_nothing_divides() -> None:
    model = make_model(tps=(1,))
    with pytest.raises(InfeasibleError, match="divides") as failure:
        search(model, HARDWARE, global_batch_size=3, pp=1)
    assert failure.value.constraint == "divisibility"


@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        ({"pp": 3}, "pp=3 must divide world_size=4; choose 1, 2, 4"),
        ({"num_microbatches": 5}, "num_microbatches=5 must divide global_batch_size=8; choose 1, 2, 4, 8"),
    ],
)
def test_impossible_dimensions_are_one_sentence(fixed: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find(**fixed)


def test_another_length_or_precision_needs_another_profile() -> None:
    with pytest.raises(ProfileError, match="seq_len=64"):
        find(seq_len=128)
    with pytest.raises(ProfileError, match="precision=fp32"):
        find(precision="bf16")


def test_baselines_that_do_not_fit_say_by_how_much() -> None:
    result = find()
    assert set(result.baselines) == {"dp", "zero3", "tp", "pp", "uniform"}
    assert result.baselines["dp"] is None
    shortfall = result.shortfalls["dp"]
    assert shortfall.plan.prediction is not None
    assert shortfall.plan.prediction.peak_memory_bytes == TIGHT + shortfall.bytes_short
    assert shortfall.bytes_short > 0


def test_endless_memory_is_compared_only_where_it_helps() -> None:
    assert step_s(find().unlimited) < step_s(find().plan)
    assert find(2**34).unlimited is None


def test_progress_and_counts() -> None:
    lines: list[str] = []
    result = find(progress=lines.append)
    counts = result.counts
    assert counts.tasks == counts.solved + counts.bounded_away + counts.infeasible
    assert len(lines) >= counts.solved
    assert "microbatch" in lines[0]
