"""plan.json, the rules a plan obeys, and the order of a stage's passes."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from galvatron.core.errors import PlanError
from galvatron.core.model import Cut, LayerKind, ModelSpec, ParameterSpec, UnitSpec
from galvatron.plan import LayerStrategy, Plan, check_runnable
from galvatron.plan.rules import check_cuts
from galvatron.plan.schedules import Action, actions, held_at_once, in_flight

ZERO3 = LayerStrategy(tp=2, dp_shard=2, zero=3)
SPEC = ModelSpec(
    name="toy",
    family="llama",
    layers=(
        LayerKind(
            count=4,
            hidden_size=8,
            ffn_size=24,
            num_heads=4,
            num_kv_heads=2,
            head_dim=2,
            parameters=(
                ParameterSpec(name="q", shape=(8, 8), cut=Cut(dim=0, segments=(4,))),
                ParameterSpec(name="k", shape=(4, 8), cut=Cut(dim=0, segments=(2,), uneven="whole")),
                ParameterSpec(name="norm", shape=(8,)),
            ),
        ),
    ),
    vocab_size=15,
    max_seq_len=64,
    tied_embeddings=False,
    embedding=UnitSpec(
        parameters=(ParameterSpec(name="e", shape=(15, 8), cut=Cut(dim=0, segments=(15,), uneven="ceil")),)
    ),
    head=UnitSpec(parameters=(ParameterSpec(name="h", shape=(15, 8), cut=Cut(dim=0, segments=(15,), uneven="ceil")),)),
)

EXPERTS = ParameterSpec(name="up", shape=(4, 24, 8), cut=Cut(dim=1, segments=(24,)), experts=True)
MOE = SPEC.model_copy(
    update={
        "layers": (SPEC.layer.model_copy(update={"num_experts": 4, "experts_per_token": 2, "parameters": (EXPERTS,)}),)
    }
)


def make(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "model": "toy",
        "world_size": 8,
        "layers_per_stage": (3, 1),
        "global_batch_size": 8,
        "seq_len": 64,
        "num_microbatches": 2,
        "embedding": LayerStrategy(tp=4),
        "head": ZERO3,
        "layers": (ZERO3, ZERO3, LayerStrategy(tp=4, recompute="full"), LayerStrategy(dp_replicate=4)),
    }
    return Plan(**{**fields, **changes})


def test_a_plan_survives_its_file_and_collapses_equal_layers() -> None:
    plan = make()
    assert Plan.from_json(plan.to_json()) == plan
    assert '"layers": "0-1"' in plan.to_json()
    assert "layers 0-1: tp 2, dp_shard 2, zero 3" in plan.describe()
    plan.validate(SPEC, 8)


def test_runs_of_layers_must_follow_each_other() -> None:
    with pytest.raises(PlanError, match="expected one from layer 2, got 3"):
        Plan.from_json(make().to_json().replace('"layers": "2"', '"layers": "3"'))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 6}, r"degrees of \(tp 4\) multiply to 4 but a stage has 3"),
        ({"layers_per_stage": (2, 2, 2)}, "pp=3 must divide world_size=8; choose 1, 2, 4, 8"),
        ({"layers_per_stage": (2, 1)}, "must sum to the 4 layers"),
        ({"num_microbatches": 3}, "num_microbatches=3 must divide global_batch_size=8"),
        ({"num_microbatches": 8}, "dp_shard x dp_replicate = 2 must divide the microbatch of 1 sequence;"),
        (
            {"layers_per_stage": (2, 2), "schedule": "interleaved", "model_chunks": 2},
            "schedule=interleaved with model_chunks=2 needs 2 or more stages, got pp=1",
        ),
        (
            {"layers_per_stage": (1,) * 4, "schedule": "zero_bubble", "model_chunks": 2, "num_microbatches": 1},
            "num_microbatches=1 must be a multiple of pp=2 under schedule=zero_bubble with model_chunks=2; choose 2, 4",
        ),
        (
            {"layers_per_stage": (1,) * 4, "schedule": "gpipe", "model_chunks": 2},
            "model_chunks=2 does not go with schedule=gpipe; use interleaved",
        ),
        ({"seq_len": 66}, "tp=4 must divide seq_len=66; choose 1, 2"),
        ({"embedding": LayerStrategy(tp=4, recompute="full")}, "recompute=full is for layers"),
        ({"layers": (ZERO3,) * 3, "layers_per_stage": (2, 1)}, "the plan has 3 layers but model toy has 4"),
    ],
)
def test_every_rule_is_named_with_values_and_a_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make(**changes).validate(SPEC)


def test_where_parameters_of_experts_lie() -> None:
    """ep takes axes next to tp's from those that shard, then from those that replicate."""
    strategy = LayerStrategy(tp=2, ulysses=2, dp_shard=2, dp_replicate=4, zero=3, recompute="full")
    dealt = {ep: strategy.model_copy(update={"ep": ep}).of_experts for ep in (1, 2, 4, 8)}
    assert dealt[1] == LayerStrategy(tp=2, dp_shard=4, dp_replicate=4, zero=3)
    assert dealt[2] == LayerStrategy(tp=4, dp_shard=2, dp_replicate=4, zero=3)
    assert dealt[4] == LayerStrategy(tp=8, dp_replicate=4)  # nothing is left to shard over
    assert dealt[8] == LayerStrategy(tp=16, dp_replicate=2)


def test_all_that_rules_allow_runs_unless_the_plan_says_what_it_lacks() -> None:
    plan = make(layers=(LayerStrategy(ep=4, dp_replicate=4),) * 4)
    check_runnable(plan)
    with pytest.raises(PlanError, match="planning alone: its what_if is copper wires; optics"):
        check_runnable(plan.model_copy(update={"what_if": ("copper wires", "optics")}))


def test_experts_that_nobody_knows_to_call_are_not_dealt_out() -> None:
    parameters = tuple(p.model_copy(update={"cut": None}) for p in MOE.layer.parameters)
    unknown = MOE.model_copy(update={"layers": (MOE.layer.model_copy(update={"parameters": parameters}),)})
    strategy = LayerStrategy(ep=2, dp_replicate=2)
    assert check_cuts(strategy, "layer", MOE, 2, MOE.max_seq_len) is None
    problem = check_cuts(strategy, "layer", unknown, 2, MOE.max_seq_len)
    assert problem == "ep=2 needs experts of a known kind, which those of layer are not; set ep to 1"


def test_a_plan_for_another_world_is_refused() -> None:
    with pytest.raises(PlanError, match="world_size=8 but 4 processes run"):
        make().validate(SPEC, 4)


def test_heads_bound_tp_and_few_kv_heads_are_kept_whole() -> None:
    eight = LayerStrategy(tp=8)
    with pytest.raises(PlanError, match="tp=8 must divide the 4 blocks of q; choose 1, 2, 4"):
        make(layers_per_stage=(4,), embedding=eight, head=eight, layers=(eight,) * 4).validate(SPEC)
    k = SPEC.layer.parameters[1]
    assert k.local_shape(2) == (2, 8)
    assert k.local_shape(4) == (4, 8)
    assert SPEC.embedding.parameters[0].local_shape(4, 3) == (3, 8)


def test_zero_and_dp_shard_go_together() -> None:
    with pytest.raises(ValueError, match="zero=0 goes with dp_shard=2"):
        LayerStrategy(dp_shard=2)


def test_tied_embeddings_need_equal_cuts() -> None:
    with pytest.raises(PlanError, match="tied embeddings need equal cuts"):
        make().validate(SPEC.model_copy(update={"tied_embeddings": True}))


def test_1f1b_warms_up_alternates_and_drains() -> None:
    text = "".join(f"{a.kind[0]}{a.microbatch}" for a in actions("1f1b", 3, 0, 4))
    assert text == "f0f1f2b0f3b1b2b3"
    assert "".join(f"{a.kind[0]}{a.microbatch}" for a in actions("1f1b", 3, 2, 2)) == "f0b0f1b1"
    assert actions("gpipe", 2, 1, 1) == [Action("forward", 0), Action("backward", 0)]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("m", [1, 2, 3, 8])
def test_every_microbatch_goes_forward_once_then_backward_once(schedule: Any, pp: int, m: int) -> None:
    plan = make(schedule=schedule, num_microbatches=m, layers_per_stage=(1,) * pp, global_batch_size=m)
    for stage in range(pp):
        order = actions(schedule, pp, stage, m)
        assert sorted(order) == sorted(Action(k, i) for k in ("forward", "backward") for i in range(m))  # type: ignore[arg-type]
        alive = peak = 0
        for action in order:
            alive += 1 if action.kind == "forward" else -1
            peak = max(peak, alive)
            assert alive >= 0
        assert peak == plan.microbatches_in_flight(stage)


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_interleaving_holds_no_fewer_activations_than_1f1b(pp: int, chunks: int) -> None:
    for m, stage, layers in itertools.product((pp, 2 * pp, 5 * pp), range(pp), range(chunks, 3 * chunks + 1)):
        sizes = [layers // chunks + (chunk < layers % chunks) for chunk in range(chunks)]  # the larger chunks first
        held = in_flight("interleaved", pp, stage, m, chunks)
        (plain,) = in_flight("1f1b", pp, stage, m)
        assert sum(size * count.alive for size, count in zip(sizes, held, strict=True)) >= layers * plain.alive


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("chunks", [2, 3, 6])
def test_putting_weight_passes_off_holds_no_more_than_the_first_stage_without(pp: int, chunks: int) -> None:
    """Passes of all chunks at once, alive or waiting; a few rounds of microbatches see the most that there is."""
    first = max(sum(alive for alive, _ in moment) for moment in held_at_once("interleaved", pp, 0, 8 * pp, chunks))
    for stage in range(pp):
        order = actions("zero_bubble", pp, stage, 8 * pp, chunks)
        held = list(itertools.accumulate({"forward": 1, "backward": 0, "weight": -1}[a.kind] for a in order))
        moments = held_at_once("zero_bubble", pp, stage, 8 * pp, chunks)
        assert max(held) == max(sum(map(sum, moment)) for moment in moments) <= first
        assert held[-1] == 0
        apart = in_flight("zero_bubble", pp, stage, 8 * pp, chunks)
        for of_chunk, own in zip(zip(*moments, strict=True), apart, strict=True):
            for alive, waiting in of_chunk:  # whichever takes more bytes
                assert alive <= own.alive
                assert alive + waiting <= own.alive + own.waiting
                assert waiting <= own.waiting + own.turned


def test_every_rank_has_rows_of_the_vocabulary() -> None:
    """5 rows over 4 ranks are 2, 2, 1 and none: the last rank has nothing to compute with."""

    def unit(words: int) -> UnitSpec:
        word = ParameterSpec(name="e", shape=(words, 8), cut=Cut(dim=0, segments=(words,), uneven="ceil"))
        return UnitSpec(parameters=(word,))

    for words, fits in ((5, False), (6, False), (7, True), (8, True), (3, False)):
        small = SPEC.model_copy(update={"vocab_size": words, "embedding": unit(words), "head": unit(words)})
        plan = make(head=LayerStrategy(tp=4))
        if fits:
            plan.validate(small)
        else:
            with pytest.raises(PlanError, match=f"embedding: tp=4 leaves a rank without any of the {words} rows of e"):
                plan.validate(small)


def test_what_is_wrong_with_a_run_is_said_once() -> None:
    data = json.loads(make().to_json())
    data["layers"] = [{"layers": "0-3", "zeroo": 2, "tp": 0}]
    with pytest.raises(PlanError) as caught:
        Plan.from_json(json.dumps(data))
    said = str(caught.value)
    assert "layers: in the run \"0-3\", zeroo: unknown key; did you mean 'zero'? known here: " in said
    assert (said.count("zeroo"), said.count("tp: must be at least 1")) == (1, 1)


def test_a_plan_does_not_exceed_the_models_positions() -> None:
    with pytest.raises(PlanError, match="seq_len=128 must be from 1 to max_seq_len=64 of toy"):
        make(seq_len=128).validate(SPEC)
    make(seq_len=128).validate()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('{"layers": "2"', '5, {"layers": "2"', r"a run of layers must be an object such as .* got 5"),
        ('"layers": "3"', '"layers": "3-99999999999999"', "below layer 16,384, got \"?'3-99999999999999'"),
        ('"layers": "3"', '"layers": "²"', 'needs "layers": "first-last"'),
        ('"layers": "3"', '"layers": 3', 'needs "layers": "first-last" .* got 3'),
        ('"layers": "3"', '"layer": "3"', 'needs "layers": "first-last" .* got None'),
        ('"tp": 4', '"tp": "4"', r"embedding.tp: must be a valid integer \(got '4'\)"),
        ('"tp": 4', '"tps": 4', r"embedding.tps: unknown key; did you mean 'tp'\? known here: cp, dp_replicate"),
        ('"layers_per_stage": [ 3, 1 ]', '"layers_per_stage": []', "layers_per_stage: must have 1 at least, has 0"),
        ('"world_size": 8', '"world_size": 100000000000', "at most 1048576"),
        ('"global_batch_size": 8', '"global_batch_size": 1000000000000', "at most 16777216"),
    ],
)
def test_a_file_that_is_no_plan_is_one_sentence(old: str, new: str, message: str) -> None:
    text = " ".join(make().to_json().split()).replace("{ ", "{").replace(" }", "}")
    assert old in text
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_json(text.replace(old, new, 1))
    assert "\n" not in str(caught.value)
