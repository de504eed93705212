"""Two plans differ by what is listed, and by nothing else."""

from __future__ import annotations

from typing import Any

from galvatron.cost import predict
from galvatron.plan import LayerStrategy, Plan
from galvatron.report import explain_prediction
from galvatron.report.diff import diff_plans
from unit.profiles import make_hardware, make_model, make_spec

DP, TP, TWO = LayerStrategy(dp_replicate=4), LayerStrategy(tp=4), LayerStrategy(dp_replicate=2)
PLAN = Plan(
    model="toy",
    world_size=4,
    layers_per_stage=(4,),
    global_batch_size=8,
    seq_len=64,
    embedding=DP,
    layers=(DP,) * 4,
    head=DP,
)


def change(**changes: Any) -> Plan:
    return PLAN.model_copy(update=changes)


def test_equal_plans() -> None:
    assert diff_plans(PLAN, change()) == "the plans are equal"


def test_layers_are_compared_in_runs_that_neither_plan_breaks() -> None:
    a, b = change(layers=(DP, DP, TP, TP)), change(layers=(DP, TP, TP, DP), head=TP)
    assert diff_plans(a, b).split("\n") == [
        "layer 1: dp_replicate 4 -> tp 4",
        "layer 3: tp 4 -> dp_replicate 4",
        "head: dp_replicate 4 -> tp 4",
    ]


def test_the_outside_is_compared_field_by_field() -> None:
    fields = {"world_size": 8, "schedule": "gpipe", "num_microbatches": 4, "precision": "bf16"}
    text = diff_plans(PLAN, change(layers_per_stage=(1, 3), embedding=TWO, **fields))
    assert text.split("\n") == [
        "pipeline: 1 stage of 4 layers -> 2 stages of 1+3 layers",
        "devices: 4 -> 8",
        "schedule: 1f1b -> gpipe",
        "microbatches: 1 -> 4",
        "precision: fp32 -> bf16",
        "embedding: dp_replicate 4 -> dp_replicate 2",
    ]


def test_another_model_has_another_number_of_layers() -> None:
    text = diff_plans(PLAN, change(model="small", layers_per_stage=(2,), layers=(TP, TP)))
    assert "model: toy -> small" in text
    assert "number of layers: 4 -> 2\nlayers 0-1: dp_replicate 4 -> tp 4" in text


def test_predictions_are_compared_where_both_have_one() -> None:
    model, hardware = make_model(make_spec(4)), make_hardware(4)
    a, b = PLAN, change(num_microbatches=2)
    a, b = (plan.model_copy(update={"prediction": predict(plan, model, hardware)}) for plan in (a, b))
    lines = diff_plans(a, b).split("\n")
    assert lines[0] == "microbatches: 1 -> 2"
    assert lines[1].startswith("step time (predicted): ")
    assert lines[1].endswith("%)")
    assert lines[2].startswith("memory by stage (predicted): ")
    assert diff_plans(PLAN, b) == "microbatches: 1 -> 2"


def test_predictions_of_compiled_layers_say_so() -> None:
    model, hardware = make_model(make_spec(4)), make_hardware(4)
    eager = PLAN.model_copy(update={"prediction": predict(PLAN, model, hardware)})
    compiled = predict(PLAN, model.model_copy(update={"compiled": True}), hardware)
    plan = Plan.from_json(PLAN.model_copy(update={"prediction": compiled}).to_json())
    assert diff_plans(eager, plan) == "layers (predicted): not compiled -> compiled"
    assert "(predicted, layers compiled)" in explain_prediction(plan)
    assert "compiled" not in explain_prediction(eager)
    assert compiled.unlike(compiled=True) is None
    assert str(compiled.unlike(compiled=False)).startswith(
        "layers are not compiled here but compiled in what the plan predicts, so that time and memory differ; "
        "set compile = true"
    )
    assert eager.prediction is not None
    assert "layers are compiled here but not compiled in" in str(eager.prediction.unlike(compiled=True))
