"""Plans go to Hetu-Galvatron's file and back; what either cannot say is refused by name."""

from __future__ import annotations

import json

import pytest

from galvatron.core.errors import PlanError
from galvatron.exchange import export_plan, import_plan
from galvatron.plan import LayerStrategy, Plan
from unit.exchange.hetu_fixtures import SPEC, reference_folder

FILE = {
    "pp_deg": 2,
    "tp_sizes_enc": "1,2,2,4",
    "tp_consecutive_flags": "1,1,1,1",
    "dp_types_enc": "1,0,0,0",
    "use_sp": "0,0,1,1",
    "checkpoint": "1,0,0,1",
    "global_bsz": 16,
    "chunks": 2,
    "pp_division": "1,3",
    "pipeline_type": "pipedream_flush",
    "default_dp_type": "zero2",
    "vtp": 2,
    "vsp": 1,
    "embed_sdp": 1,
}


def read(**changes: object) -> Plan:
    return import_plan(json.dumps({**FILE, **changes}), world_size=8, seq_len=128)


def make(layer: LayerStrategy, end: LayerStrategy | None = None, **changes: object) -> Plan:
    end = end or layer.model_copy(update={"recompute": "none", "ep": 1})
    fields = {"model": "toy", "world_size": 8, "layers_per_stage": (2,), "global_batch_size": 16, "seq_len": 128}
    return Plan.model_validate({**fields, "embedding": end, "layers": (layer, layer), "head": end, **changes})


def test_every_field_has_its_meaning() -> None:
    plan = read()
    assert (plan.layers_per_stage, plan.schedule, plan.num_microbatches, plan.precision) == ((1, 3), "1f1b", 2, "bf16")
    assert plan.layers == (
        LayerStrategy(dp_shard=4, zero=3, recompute="full"),
        LayerStrategy(tp=2, dp_shard=2, zero=2),
        LayerStrategy(ulysses=2, dp_shard=2, zero=2),
        LayerStrategy(ulysses=4, zero=2, recompute="full"),
    )
    assert plan.embedding == plan.head == LayerStrategy(ulysses=2, dp_shard=2, zero=3)
    assert plan.what_if == ()


def test_older_files_leave_fields_out() -> None:
    old = {key: value for key, value in FILE.items() if key not in ("use_sp", "checkpoint", "vtp", "vsp", "embed_sdp")}
    plan = import_plan(json.dumps(old), world_size=8, seq_len=128)
    assert plan.layers[2] == LayerStrategy(tp=2, dp_shard=2, zero=2)
    assert plan.layers[3] == LayerStrategy(tp=4), "nothing is held twice, so ZeRO means nothing"
    assert plan.embedding == LayerStrategy(dp_shard=4, zero=2)


@pytest.mark.parametrize("default", ["ddp", "zero2", "zero3"])
def test_a_plan_survives_export_and_import(default: str) -> None:
    plan = read(default_dp_type=default, pipeline_type="gpipe")
    assert import_plan(export_plan(plan), 8, 128, model=plan.model) == plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_bsz": 1024, "chunks": 41}, "chunks=41 must divide global_bsz=1024, .* set chunks to 32 or 64"),
        ({"global_bsz": 16, "chunks": 41}, "chunks=41 must divide global_bsz=16, .* set chunks to 16, or"),
        ({"pp_deg": 3}, "pp_deg=3 must divide world_size=8"),
        ({"pp_division": "4"}, "pp_division must list pp_deg=2 stages, got 1"),
        ({"pp_division": "1,2"}, "must sum to the 4 layers"),
        ({"tp_sizes_enc": "1,2,2,3"}, "a tensor or sequence degree of 3 must divide the 4 devices of a stage"),
        ({"tp_sizes_enc": "1,2,x"}, "tp_sizes_enc must be whole numbers joined by commas, got '1,2,x'"),
        ({"tp_consecutive_flags": "1,0,1,1"}, "tp_consecutive_flags must be 1 for every layer"),
        ({"use_sp": "0,1"}, "use_sp must be 4 values of 0 or 1, one a layer"),
        ({"checkpoint": "0,1,2,0"}, "checkpoint must be 4 values of 0 or 1"),
        ({"pipeline_type": "zbh1"}, "pipeline_type: must be 'gpipe' or 'pipedream_flush'"),
        ({"cp_sizes_enc": "1,1,1,1"}, "cp_sizes_enc: unknown key"),
        ({"global_bsz": 2}, "must divide the microbatch of 1 sequence;"),
    ],
)
def test_a_wrong_file_is_one_sentence(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        read(**changes)
    assert "\n" not in str(caught.value)


def test_text_that_is_no_json_is_one_sentence() -> None:
    with pytest.raises(PlanError, match="galvatron_config is not JSON"):
        import_plan("{", 8, 128, source="galvatron_config")


def test_a_plan_is_held_against_its_model() -> None:
    with pytest.raises(PlanError, match="the plan has 4 layers but model toy has 2"):
        import_plan(json.dumps(FILE), 8, 128, spec=SPEC)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (make(LayerStrategy(cp=2, dp_replicate=4), LayerStrategy(ulysses=2, dp_replicate=4)), "cp=2 of layer 0"),
        (make(LayerStrategy(ep=2, dp_shard=8, zero=2)), "ep=2 of layer 0"),
        (make(LayerStrategy(dp_shard=8, zero=1)), "zero=1 of embedding"),
        (
            make(LayerStrategy(dp_shard=4, dp_replicate=2, zero=3)),
            "dp_replicate=2 of what dp_shard=4 shards of embedding",
        ),
        (make(LayerStrategy(tp=2, ulysses=2, dp_replicate=2)), "tp=2 together with ulysses=2 of embedding"),
        (make(LayerStrategy(dp_replicate=8, recompute="linears")), "recompute=linears of layer 0"),
        (
            make(LayerStrategy(dp_replicate=8), LayerStrategy(dp_shard=8, zero=2)),
            "data parallelism and zero 2 in one plan",
        ),
        (
            make(LayerStrategy(tp=8), head=LayerStrategy(dp_replicate=8)),
            r"an embedding \(tp 8\) and a head \(dp_replicate 8\)",
        ),
        (
            make(LayerStrategy(dp_replicate=4), layers_per_stage=(1, 1), schedule="zero_bubble"),
            "schedule=zero_bubble",
        ),
    ],
)
def test_what_the_format_cannot_say_is_named(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=f"cannot say .*{message}"):
        export_plan(plan)


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        ("galvatron_config_llama2-7b_1nodes_8gpus_per_node_36GB_bf16", 8),
        ("llama-7b_2nodes_16gpus_40GB", 16),
        ("t5-3B_1nodes_8gpus_34GB", 8),
    ],
)
def test_the_real_plans_survive_import_and_export(name: str, world_size: int) -> None:
    text = (reference_folder() / "plans" / f"{name}.json").read_text()
    plan = import_plan(text, world_size, 512)
    assert import_plan(export_plan(plan), world_size, 512) == plan
    ours, theirs = json.loads(export_plan(plan)), json.loads(text)
    assert {key: ours[key] for key in theirs} == theirs
    assert plan.layers[0] == LayerStrategy(dp_shard=world_size, zero=3, recompute="full")


def test_the_real_plan_of_unequal_microbatches_is_refused() -> None:
    text = (reference_folder() / "plans" / "swin-huge_1nodes_8gpus_34GB.json").read_text()
    with pytest.raises(PlanError, match="chunks=41 must divide global_bsz=1024"):
        import_plan(text, 8, 3136)
