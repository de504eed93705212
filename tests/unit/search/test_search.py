"""What a search promises beyond the optimum: bounds, monotony, limits, determinism, rivals, clear refusals."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from galvatron.core.errors import ConfigError, InfeasibleError, ProfileError
from galvatron.core.model import RECOMPUTES, ModelSpec
from galvatron.core.model_profile import ModelProfile
from galvatron.core.units import parse_bytes
from galvatron.cost import Setting, predict
from galvatron.cost.step import objective_s
from galvatron.plan.axes import StageAxes
from galvatron.plan.plan import Plan, Proof, StagePrediction
from galvatron.plan.rules import check_plan, check_runnable
from galvatron.search import FAMILIES, Limits, SearchResult, search
from galvatron.search.baselines import members
from galvatron.search.bounds import lower_bounds_s, stage_bounds
from galvatron.search.builder import SpaceBuilder
from galvatron.search.layers import LITTLE_EFFORT, Effort
from galvatron.search.smallest import smallest
from galvatron.search.solution import Solution
from galvatron.search.solve import _solve_near, parts, solve
from galvatron.search.tables import TaskSolver
from galvatron.search.tasks import Task, tasks
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


@pytest.mark.parametrize("gap", [0.01, 0.2])
def test_a_gap_is_kept_and_saves_work(gap: float) -> None:
    exact, near = find(), find(gap=gap)
    assert 0 <= proof_of(near).gap <= gap
    assert proof_of(near).lower_bound_s <= proof_of(exact).objective_s * (1 + 1e-9)
    assert proof_of(near).objective_s * (1 - gap) <= proof_of(exact).objective_s
    assert near.counts.solved <= exact.counts.solved
    assert near.stopped is None


def test_the_proof_is_true_where_chains_had_to_be_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = int(0.74 * TIGHT)
    exact = proof_of(find(limit))
    few = Effort(labels=4, least=1, most=2, bounds=True)
    monkeypatch.setattr("galvatron.search.engine.FULL_EFFORT", few)
    monkeypatch.setattr("galvatron.search.solve.GREAT_EFFORT", few)
    merged = proof_of(find(limit))
    assert merged.gap > 0
    assert merged.lower_bound_s <= exact.objective_s <= merged.objective_s * (1 + 1e-9)


def test_a_time_limit_ends_a_search_with_some_plan_and_an_honest_gap() -> None:
    exact, stopped = find(), find(time_limit_s=0.0)
    check_plan(stopped.plan, MODEL.spec, 4)
    assert stopped.stopped == "time limit"
    assert step_s(stopped.plan) >= step_s(exact.plan) * (1 - 1e-9)
    assert 0 < proof_of(stopped).gap < 1
    assert proof_of(stopped).lower_bound_s <= proof_of(exact).objective_s * (1 + 1e-9)
    assert stopped.baselines == {}
    assert find(time_limit_s=3600.0).stopped is None


def test_a_tight_limit_gives_a_mix_that_fits_and_that_the_runtime_accepts() -> None:
    limit = int(0.72 * TIGHT)
    result = find(limit, limits=Limits(forbid=frozenset({"interleaved", "zero_bubble"})))
    check_plan(result.plan, MODEL.spec, 4)
    assert result.plan.prediction is not None
    assert result.plan.prediction.peak_memory_bytes <= limit
    assert {strategy.recompute for strategy in result.plan.layers} == {*RECOMPUTES} - {"full"}
    again = predict(result.plan, MODEL, HARDWARE, limit)
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


def test_fixed_and_bounded_dimensions_are_kept() -> None:
    result = find(limits=Limits(fix={"pp": 2, "num_microbatches": 4}, at_most={"tp": 1}))
    for plan in (result.plan, *result.candidates):
        assert (plan.pp, plan.num_microbatches) == (2, 4)
        assert all(strategy.tp == 1 for strategy in plan.strategies())


def test_what_is_forbidden_is_not_used() -> None:
    result = find(limits=Limits("all", forbid=frozenset({"full", "ulysses", "interleaved", "zero"})))
    for plan in (result.plan, *result.candidates):
        assert plan.schedule != "interleaved"
        assert all((s.ulysses, s.zero) == (1, 0) and s.recompute != "full" for s in plan.strategies())


def test_the_runtime_can_run_all_that_is_searched() -> None:
    runtime, everything = find(), find(limits=Limits("all"))
    for plan in (runtime.plan, *runtime.candidates, *everything.candidates):
        check_runnable(plan)
        assert plan.what_if == ()
    assert proof_of(everything).objective_s == proof_of(runtime).objective_s


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_as_the_space_finds_its_baseline(name: str) -> None:
    limit = 60 * 2**20
    baseline = find(limit).baselines[name]
    if baseline is None:
        with pytest.raises(InfeasibleError):
            find(limit, limits=Limits.parse(name), baselines=False)
        return
    plan = find(limit, limits=Limits.parse(name), baselines=False).plan
    assert step_s(plan) == pytest.approx(step_s(baseline))
    assert len(set(plan.layers)) == 1


def test_of_several_batches_the_one_with_the_best_throughput_is_chosen() -> None:
    alone = {batch: search(MODEL, HARDWARE, global_batch_size=batch, memory_limit_bytes=TIGHT) for batch in (4, 8, 16)}
    together = search(MODEL, HARDWARE, global_batch_size=(16, 4, 8), memory_limit_bytes=TIGHT)
    rates = {batch: proof_of(result).objective_s / batch for batch, result in alone.items()}
    best = together.plan.global_batch_size
    assert proof_of(together).objective_s / best == pytest.approx(min(rates.values()))


def test_tied_embedding_and_head_are_cut_alike() -> None:
    tied = make_model(make_spec(4, hidden=256, ffn=768, vocab=2000, tied=True), flops_per_s=2e11)
    for limits in (Limits(), Limits(fix={"pp": 2})):
        result = find(model=tied, limits=limits)
        check_plan(result.plan, tied.spec, 4)


def builder(model: ModelProfile, batch: int, limits: Limits | None = None) -> SpaceBuilder:
    job = Setting(model, HARDWARE, 1, 1, batch, model.seq_len, "fp32", "fp32")
    return SpaceBuilder(job, limits or Limits(), TIGHT)


def every_task(batch: int, layers: int = 4, limits: Limits | None = None) -> list[Task]:
    return list(tasks(4, layers, [batch], limits or Limits()))


@pytest.mark.parametrize(
    "seq_len", [64, 2048, pytest.param(8192, marks=pytest.mark.slow)]
)  # parameters or, ever more, activations fill the memory
def test_no_bound_exceeds_its_task_s_optimum(seq_len: int) -> None:
    model, compared = make_model(small_spec(), seq_len=seq_len, flops_per_s=2e11), 0
    spaces = builder(model, 4)
    for task in every_task(4, limits=Limits("all")):
        least = smallest(spaces.build(task))
        for factor in (1.0, 1.05, 1.3, 2.0, 20.0) if least else ():
            assert least is not None
            space = spaces.build(task, int(least.value * factor))
            bound, solution = lower_bounds_s(space)[0], solve(space).solution
            assert solution is not None
            compared += 1
            assert solution.value / 3 <= bound <= solution.value  # true, and worth having
            assert objective_s(solution.plan(space), space.setting) == pytest.approx(solution.value, rel=1e-12)
            for member in members(space, "uniform", 4) if factor == 1.3 else ():
                alone = solve(space.restricted(member.chosen)).solution
                assert alone is None or member.bound_s <= alone.value
    assert compared > 50


def small_spec() -> ModelSpec:
    return make_spec(4, hidden=256, ffn=768, vocab=300)


def test_the_bound_of_a_deep_pipeline_counts_the_emptiest_stage() -> None:
    model = make_model(make_spec(16, hidden=64, ffn=192, vocab=30), seq_len=2048, tps=(1,), flops_per_s=2e11)
    no_workspace = {"workspace_bytes_per_sequence": 0}  # so that what is held decides
    samples = tuple(sample.model_copy(update=no_workspace) for sample in model.activations)
    spaces = builder(model.model_copy(update={"activations": samples}), 16)
    task = Task(16, 4, 16)
    least = smallest(spaces.build(task))
    assert least is not None
    for factor in (1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0):
        space = spaces.build(task, int(least.value * factor))
        solution = solve(space).solution
        assert solution is not None
        assert lower_bounds_s(space)[0] <= solution.value


def test_least_memory_is_the_smallest_limit_with_a_plan() -> None:
    spaces, compared = builder(MODEL, 8), 0
    for task in every_task(8):
        least = smallest(spaces.build(task))
        if least is None:
            continue
        compared += 1
        assert solve(spaces.build(task, int(least.value))).solution is not None
        assert solve(spaces.build(task, int(least.value) - 1)).solution is None
    assert compared > 10


def test_strategies_are_every_assignment_of_axes() -> None:
    spaces = builder(MODEL, 8, Limits(forbid=frozenset({"ulysses", "cp"})))
    found = spaces.rows(4, "layer").rows()
    assert len(found) == len(set(found)) == len(RECOMPUTES) * 12
    everything = builder(MODEL, 8).rows(4, "layer")
    assert set(found) < set(everything.rows())
    assert set(everything.sequence_degree) == set(StageAxes(4).degrees)


def test_tasks_leave_out_what_cannot_differ() -> None:
    found = [(t.pp, t.num_microbatches, t.schedule, t.model_chunks) for t in every_task(2, layers=2)]
    pipelines = [(2, 1, "1f1b", 1), (2, 2, "1f1b", 1), (2, 2, "zero_bubble", 1)]
    assert found == [(1, 1, "1f1b", 1), (1, 2, "1f1b", 1), *pipelines]
    gpipe = every_task(2, layers=2, limits=Limits(fix={"schedule": "gpipe", "pp": 2}))
    assert [task.schedule for task in gpipe] == ["gpipe", "gpipe"]
    chunks = [t.model_chunks for t in every_task(4, 4, Limits("all")) if t.schedule == "interleaved"]
    assert chunks == [2, 2]
    alone = every_task(4, 4, Limits("all", forbid=frozenset({"interleaved"})))
    assert {t.model_chunks for t in alone if t.schedule == "zero_bubble"} == {1, 2}


def test_weight_passes_of_an_interleaved_plan_are_put_off_where_that_fits() -> None:
    model = make_model(make_spec(8), flops_per_s=1e9)

    def chunked(limit: int, *forbidden: str, model: ModelProfile = model) -> Plan:
        limits = Limits(fix={"pp": 2, "num_microbatches": 4}, forbid=frozenset({"1f1b", *forbidden}))
        return find(limit, model=model, hardware=make_hardware(2), limits=limits, baselines=False).plan

    plain, twin = chunked(2**34, "zero_bubble"), chunked(2**34)
    assert (plain.schedule, twin.schedule) == ("interleaved", "zero_bubble")
    assert twin == plain.model_copy(update={"schedule": "zero_bubble", "prediction": twin.prediction})
    assert step_s(twin) < step_s(plain)
    assert chunked(2**34, model=model.model_copy(update={"fp8": True})).schedule == "interleaved"
    check_runnable(twin)


def test_float8_products_have_no_zero_bubble() -> None:
    model = make_model(make_spec(4)).model_copy(update={"fp8": True})
    fixed = Limits.parse(fix=["schedule=zero_bubble"])
    with pytest.raises(ConfigError, match="fp8 products have no backward in two passes"):
        search(model, make_hardware(4), global_batch_size=8, limits=fixed)


@pytest.mark.parametrize("asked", ["schedule=zero_bubble", "schedule=gpipe", "schedule=interleaved", "model_chunks=2"])
def test_a_schedule_that_is_asked_for_is_a_pipeline_s(asked: str) -> None:
    """One stage has none, however fast it would be."""
    plan = find(None, limits=Limits.parse(fix=[asked])).plan
    assert plan.pp > 1
    name, value = asked.split("=")
    assert str(getattr(plan, name)) == value
    with pytest.raises(InfeasibleError, match="fix pp=1 together leave no plan"):
        find(None, limits=Limits.parse(fix=[asked, "pp=1"]))


def test_memory_that_no_device_has_is_no_remedy() -> None:
    small = HARDWARE.device.model_copy(update={"memory_bytes": 4 * 2**20})
    hardware = HARDWARE.model_copy(update={"device": small})
    with pytest.raises(InfeasibleError, match="too much; take more devices"):
        find(4 * 2**20, hardware=hardware)


def test_too_little_memory_says_how_much_would_do() -> None:
    with pytest.raises(InfeasibleError, match=r"needs (\S+ MiB) on stage \d, .* too much; allow \1, ") as failure:
        find(4 * 2**20)
    assert failure.value.constraint.startswith("memory of stage")
    enough = re.search(r"allow (\d+\.\d\d) MiB", str(failure.value))
    assert enough is not None
    find(parse_bytes(f"{enough[1]}MiB"))
    with pytest.raises(InfeasibleError):
        find(parse_bytes(f"{float(enough[1]) - 0.01}MiB"))


def test_experts_that_are_not_there_are_not_dealt_out() -> None:
    with pytest.raises(ConfigError, match=r"ep=2 deals out experts and toy has none; leave ep out"):
        search(make_model(), make_hardware(4), global_batch_size=4, limits=Limits(fix={"ep": 2}))


def test_nothing_divides() -> None:
    model = make_model(tps=(1,))
    said = "fix pp=1 leaves no plan of toy at seq_len=64, global_batch_size=4 on 3 devices; drop or change it"
    with pytest.raises(InfeasibleError, match=said) as failure:
        search(model, make_hardware(3), global_batch_size=4, limits=Limits(fix={"pp": 1}))
    assert failure.value.constraint == "divisibility"
    five = make_hardware(5)
    with pytest.raises(
        InfeasibleError, match=r"no plan of toy at .* on 5 devices: no strategy divides them"
    ) as failure:
        search(model, five, global_batch_size=3)


@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        ({"pp": 3}, "pp=3 must divide world_size=4; choose 1, 2, 4"),
        ({"num_microbatches": 5}, "num_microbatches=5 must divide global_batch_size=8; choose 1, 2, 4, 8"),
    ],
)
def test_impossible_dimensions_are_one_sentence(fixed: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find(limits=Limits(fix=fixed))


def test_another_length_or_precision_needs_another_profile() -> None:
    with pytest.raises(ProfileError, match="seq_len=64"):
        find(seq_len=128)
    with pytest.raises(ProfileError, match="precision=fp32"):
        find(precision="bf16")


def test_baselines_that_do_not_fit_say_by_how_much() -> None:
    result = find()
    assert set(result.baselines) == set(FAMILIES) == {"dp", "fsdp", "tp", "pp", "3d", "uniform"}
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
    assert any("microbatch" in line for line in lines)


@pytest.mark.parametrize(
    "seed", [*(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 4, 11)), 5, 13]
)  # where plans a little beyond the first guess are not the best
def test_a_first_guess_of_the_optimum_changes_nothing(seed: int) -> None:
    model = make_model(make_spec(6, hidden=256, ffn=768, vocab=300), seq_len=2048, flops_per_s=2e11, seed=seed)
    hardware, limits = make_hardware(4, "cuda", seed=seed, memory_bytes=2**40), Limits("all")
    job = Setting(model, hardware, 1, 1, 8, model.seq_len, model.precision, "fp32")
    spaces = SpaceBuilder(job, limits, 2**40)
    for task in tasks(4, 6, [8], limits):
        least = smallest(spaces.build(task))
        for factor in (1.1, 1.3, 1.7) if least is not None else ():
            space = spaces.build(task, int(least.value * factor))  # type: ignore[union-attr]
            unguessed = [TaskSolver(p.space, p.bounds.of(p.space), math.inf) for p in parts(space)]
            best, solved = [found.value for solver in unguessed if (found := solver.solve())], solve(space)
            assert not any(solver.merged for solver in unguessed)
            assert solved.solution is not None
            # interleaved layers may have several layouts, which these parts have not
            alike = min(best) if task.model_chunks == 1 else min(*best, solved.solution.value)
            assert solved.solution.value == pytest.approx(alike, rel=1e-12)
            assert solved.lower_bound_s == solved.solution.value


@pytest.mark.parametrize("gap", [1e-3, 1e-6])
@pytest.mark.parametrize("excess", [0.0, 5e-7, 0.05])
def test_long_chains_are_solved_as_nearly_as_is_said(
    gap: float, excess: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much worse than the best the plan is that a little effort begins with, and if nothing more is shown."""

    def solve_near(*given: Any) -> Solution | None:
        near = _solve_near(*given)
        return None if near is None else dataclasses.replace(near, value=near.value * (1 + excess))

    model = make_model(make_spec(6, hidden=256, ffn=768, vocab=300), seq_len=2048, flops_per_s=2e11, seed=5)
    job = Setting(model, make_hardware(4, "cuda", seed=5, memory_bytes=2**40), 1, 1, 8, 2048, model.precision, "fp32")
    spaces = SpaceBuilder(job, Limits("all"), 2**40)
    for task in (task for task in tasks(4, 6, [8], Limits("all")) if task.model_chunks == 1):
        least = smallest(spaces.build(task))
        for factor in (1.1, 1.3, 1.7) if least is not None else ():
            space = spaces.build(task, int(least.value * factor))  # type: ignore[union-attr]
            optimum = solve(space).lower_bound_s
            with monkeypatch.context() as patched:
                patched.setattr("galvatron.search.solve.LONG", 0)
                patched.setattr("galvatron.search.solve.GOOD", gap)
                if excess:
                    patched.setattr("galvatron.search.solve._solve_near", solve_near)
                    patched.setattr("galvatron.search.solve.WHOLE_EFFORT", Effort(1, 1, 1, bounds=True, whole=True))
                long = solve(space)
            assert long.solution is not None
            assert optimum <= long.solution.value * (1 + 1e-12) <= long.lower_bound_s * (1 + gap) * (1 + 1e-9)
            assert long.lower_bound_s <= optimum * (1 + 1e-12)


def test_pairs_of_tied_ends_bounded_as_one_hide_no_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(
        make_spec(12, hidden=256, ffn=768, vocab=3000, tied=True), seq_len=2048, flops_per_s=2e11, seed=13
    )
    hardware = make_hardware(8, "cuda", seed=13, memory_bytes=2**40)
    job, alike = Setting(model, hardware, 1, 1, 8, model.seq_len, model.precision, "fp32"), 0
    spaces = SpaceBuilder(job, Limits("all"), 2**40)
    for task in (task for task in tasks(8, 12, [8], Limits("all")) if task.schedule == "1f1b" and task.pp in (2, 4)):
        least = smallest(spaces.build(task))
        for factor in (1.3, 1.7) if least is not None else ():
            space = spaces.build(task, int(least.value * factor))  # type: ignore[union-attr]
            alone = [dataclasses.replace(part, alike=None) for part in parts(space)]
            alike += sum(part.alike is not None for part in parts(space))
            found = solve(space)
            with monkeypatch.context() as patched:
                patched.setattr("galvatron.search.solve.parts", lambda *_, alone=alone: alone)
                assert found == solve(space)
    assert alike > 20


@pytest.mark.parametrize(
    ("world_size", "device"),
    [
        *((4, "cpu"), (6, "cuda"), (8, "cuda")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, "cuda"), (6, "cpu"), (8, "cpu"))),
    ],
)
def test_1f1b_bounds_its_interleaved_kin(world_size: int, device: str) -> None:
    model = make_model(make_spec(12, hidden=256, ffn=768, vocab=300), seq_len=2048, flops_per_s=2e11)
    hardware = make_hardware(world_size, device, memory_bytes=2**40)
    job = Setting(model, hardware, 1, 1, 24, model.seq_len, model.precision, "fp32")
    spaces, ratios = SpaceBuilder(job, Limits("all"), 2**40), []
    for task in tasks(world_size, 12, [24], Limits("all")):
        if task.schedule != "interleaved":
            continue
        plain, least = dataclasses.replace(task, schedule="1f1b", model_chunks=1), smallest(spaces.build(task))
        for factor in (1.05, 1.5, 4.0) if least is not None else ():
            usable = int(least.value * factor)  # type: ignore[union-attr]
            floor = lower_bounds_s(spaces.build(plain, usable), spaces.setting(task))[1]
            solved = solve(spaces.build(task, usable), effort=LITTLE_EFFORT)
            assert solved.solution is not None
            assert floor <= solved.solution.value
            ratios.append(floor / lower_bounds_s(spaces.build(task, usable))[0])
    assert len(ratios) > 20
    assert 0.5 < min(ratios) <= max(ratios) < 1 + 1e-9


def tensor_bytes(stage: StagePrediction) -> int:
    kept = stage.parameter_bytes + stage.gradient_bytes + stage.optimizer_bytes + stage.activation_bytes
    return kept + stage.unsharded_bytes + stage.workspace_bytes


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
@pytest.mark.parametrize("bounds", [True, False])
def test_merged_labels_give_plans_that_fit_and_bounds_that_hold(seed: int, bounds: bool) -> None:
    model = make_model(make_spec(6, hidden=256, ffn=768, vocab=300), seq_len=2048, flops_per_s=2e11, seed=seed)
    hardware = make_hardware(4, "cuda", seed=seed, memory_bytes=2**40)
    job = Setting(model, hardware, 1, 1, 8, model.seq_len, model.precision, "fp32")
    spaces, num_merged = SpaceBuilder(job, Limits("all"), 2**40), 0
    for task in tasks(4, 6, [8], Limits("all")):
        least = smallest(spaces.build(task))
        assert least is not None
        for usable in (int(least.value * factor) for factor in (1.05, 1.3, 1.7)):
            for space in (part.space for part in parts(spaces.build(task, usable))):
                exact = solve(space)
                solver = TaskSolver(space, stage_bounds(space), math.inf, Effort(0, 12, 12, bounds))
                found = solver.solve()
                num_merged += solver.merged
                assert solver.bound_s <= exact.lower_bound_s * (1 + 1e-9)
                if found is not None:
                    assert exact.solution is not None
                    assert found.value >= exact.solution.value * (1 - 1e-9)
                    plan = predict(found.plan(space), model, hardware)
                    assert max(map(tensor_bytes, plan.stages)) <= usable
    assert num_merged > 20


def test_moments_are_offloaded_where_it_is_asked_for() -> None:
    hardware = make_hardware(2, host_bytes_per_s=4e9)
    small: dict[str, Any] = {"global_batch_size": 4, "baselines": False}
    found = {
        limits: {
            s.offload for s in search(make_model(), hardware, limits=Limits.parse(*limits), **small).plan.strategies()
        }
        for limits in (("runtime",), ("runtime", ("offload=optimizer",)))
    }
    assert list(found.values()) == [{"none"}, {"optimizer"}]
    with pytest.raises(ProfileError, match="host_bytes_per_s"):
        search(make_model(), make_hardware(2), limits=Limits.parse("runtime", ("offload=optimizer",)), **small)
