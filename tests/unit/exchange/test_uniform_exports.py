"""torchtitan and Megatron-LM get exactly the plans that they can say."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from galvatron.core.errors import PlanError
from galvatron.exchange import to_megatron, to_torchtitan
from galvatron.plan import LayerStrategy, Plan

ZERO3 = LayerStrategy(tp=2, dp_shard=4, zero=3)


def make(layers: LayerStrategy | tuple[LayerStrategy, ...], end: LayerStrategy | None = None, **changes: Any) -> Plan:
    each = layers if isinstance(layers, tuple) else (layers,) * 4
    cp = each[0].cp
    end = end or each[0].model_copy(update={"recompute": "none", "ep": 1, "cp": 1, "ulysses": each[0].ulysses * cp})
    fields: dict[str, Any] = {"model": "toy", "layers_per_stage": (4,), "global_batch_size": 32, "seq_len": 128}
    fields |= {"world_size": each[0].num_devices, "num_microbatches": 4, "precision": "bf16"}
    return Plan.model_validate({**fields, "embedding": end, "layers": each, "head": end, **changes})


def stages(layers: LayerStrategy | tuple[LayerStrategy, ...], per_stage: tuple[int, ...], **changes: Any) -> Plan:
    pp = len(per_stage) // changes.get("model_chunks", 1)
    devices = (layers if isinstance(layers, LayerStrategy) else layers[0]).num_devices
    return make(layers, layers_per_stage=per_stage, world_size=pp * devices, **changes)


def again(strategy: LayerStrategy) -> LayerStrategy:
    return strategy.model_copy(update={"recompute": "full"})


def options(plan: Plan) -> dict[str, str | bool]:
    """Megatron-LM's arguments as a dictionary; a flag is True."""
    arguments, found = to_megatron(plan), {}
    for index, argument in enumerate(arguments):
        if argument.startswith("--"):
            value = arguments[index + 1] if index + 1 < len(arguments) else "--"
            found[argument] = True if value.startswith("--") else value
    return found


def test_torchtitan_accumulates_without_a_pipeline() -> None:
    config = tomllib.loads(to_torchtitan(make(again(ZERO3))))
    assert config["training"] == {
        "local_batch_size": 2,
        "global_batch_size": 32,
        "seq_len": 128,
        "mixed_precision_param": "bfloat16",
        "mixed_precision_reduce": "float32",
    }
    assert config["parallelism"] == {
        "data_parallel_replicate_degree": 1,
        "data_parallel_shard_degree": 4,
        "fsdp_reshard_after_forward": "always",
        "tensor_parallel_degree": 2,
        "context_parallel_degree": 1,
        "expert_parallel_degree": 1,
        "pipeline_parallel_degree": 1,
    }
    assert config["activation_checkpoint"] == {"mode": "full"}


def test_torchtitan_cuts_a_pipelined_batch_itself() -> None:
    text = to_torchtitan(stages(ZERO3, (1, 3)))
    config = tomllib.loads(text)
    assert config["training"]["local_batch_size"] == 8
    pipeline = {key: value for key, value in config["parallelism"].items() if "pipeline" in key or "module" in key}
    assert pipeline == {
        "pipeline_parallel_degree": 2,
        "pipeline_parallel_schedule": "1F1B",
        "pipeline_parallel_microbatch_size": 2,
        "module_fqns_per_model_part": [
            ["tok_embeddings", "layers.0"],
            ["layers.1", "layers.2", "layers.3", "norm", "output"],
        ],
    }
    assert text.startswith("# in a pipeline gradients stay whole")
    assert not to_torchtitan(stages(LayerStrategy(dp_shard=4, zero=1), (1, 3))).startswith("#")


def test_torchtitan_degrees() -> None:
    ring = tomllib.loads(to_torchtitan(make(LayerStrategy(cp=2, ep=4, dp_shard=2, dp_replicate=2, zero=2))))[
        "parallelism"
    ]
    assert (ring["context_parallel_degree"], ring["context_parallel_rotate_method"]) == (2, "alltoall")
    assert (ring["expert_parallel_degree"], ring["expert_tensor_parallel_degree"]) == (4, 1)
    assert (ring["data_parallel_replicate_degree"], ring["fsdp_reshard_after_forward"]) == (2, "never")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            make((again(ZERO3),) * 3 + (ZERO3,)),
            r"here they are layers 0-2 \(tp 2, dp_shard 4, zero 3, recompute full\) and layer 3 \(tp 2, dp_shard 4, ",
        ),
        (
            make(ZERO3, LayerStrategy(dp_shard=8, zero=3)),
            r"here the embedding is \(dp_shard 8, zero 3\), not \(tp 2, dp_shard 4, zero 3\)",
        ),
        (make(LayerStrategy(ulysses=2, dp_shard=4, zero=3)), "ulysses=2"),
        (make(LayerStrategy(dp_shard=8, zero=1)), "zero=1 without a pipeline"),
        (make(LayerStrategy(cp=2, dp_replicate=4)), "cp=2 with zero=0"),
        (make(LayerStrategy(cp=2, ep=8, dp_shard=2, dp_replicate=2, zero=2)), "ep=8 that does not lie between"),
        (make(LayerStrategy(dp_shard=8, zero=3, recompute="selective")), "recompute=selective as it is meant here"),
        (make(ZERO3, schedule="gpipe"), "schedule=gpipe without a pipeline"),
        (stages(ZERO3, (2, 2), schedule="zero_bubble"), "schedule=zero_bubble"),
        (make(ZERO3, grad_reduce_dtype="bf16"), "grad_reduce_dtype=bf16"),
    ],
)
def test_torchtitan_refuses_by_name(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=f"torchtitan cannot say .*{message}"):
        to_torchtitan(plan)


def test_megatron_with_the_distributed_optimizer() -> None:
    plan = make(LayerStrategy(tp=2, dp_shard=2, dp_replicate=2, zero=1), grad_reduce_dtype="bf16")
    assert options(plan) == {
        "--tensor-model-parallel-size": "2",
        "--sequence-parallel": True,
        "--context-parallel-size": "1",
        "--expert-model-parallel-size": "1",
        "--pipeline-model-parallel-size": "1",
        "--use-distributed-optimizer": True,
        "--num-distributed-optimizer-instances": "2",
        "--micro-batch-size": "2",
        "--global-batch-size": "32",
        "--seq-length": "128",
        "--bf16": True,
        "--grad-reduce-in-bf16": True,
    }


def test_megatron_shards_more_with_its_fsdp() -> None:
    for zero, sharding in ((2, "optim_grads"), (3, "optim_grads_params")):
        found = options(make(LayerStrategy.model_validate({"dp_shard": 8, "zero": zero})))
        assert found["--data-parallel-sharding-strategy"] == sharding
        assert found["--use-megatron-fsdp"] is True
    assert "--use-distributed-optimizer" not in options(make(LayerStrategy(dp_replicate=8), precision="fp32"))


def test_megatron_context_parallelism_is_a_ring_or_ulysses() -> None:
    ring, ulysses = (
        options(make(LayerStrategy.model_validate({axis: 2, "dp_replicate": 4}))) for axis in ("cp", "ulysses")
    )
    assert (ring["--context-parallel-size"], ring["--cp-comm-type"]) == ("2", "p2p")
    assert (ulysses["--context-parallel-size"], ulysses["--cp-comm-type"]) == ("2", "a2a")


def test_megatron_pipelines() -> None:
    one = LayerStrategy(dp_replicate=2)
    assert options(stages(one, (2, 2)))["--pipeline-model-parallel-size"] == "2"
    assert "--pipeline-model-parallel-layout" not in options(stages(one, (2, 2)))
    assert options(stages(one, (1, 3)))["--pipeline-model-parallel-layout"] == "Et*1|t*3L"
    chunks = options(stages(one, (1, 1, 1, 1), schedule="interleaved", model_chunks=2))
    assert (chunks["--pipeline-model-parallel-size"], chunks["--num-layers-per-virtual-pipeline-stage"]) == ("2", "1")


@pytest.mark.parametrize(
    ("recomputed", "per_stage", "method", "number"),
    [
        ((True, True, True, True), (2, 2), "uniform", "1"),
        ((True, False, True, False), (2, 2), "block", "1"),
        ((True, True, True, False), (1, 3), None, None),
        ((True, True, False, False), (1, 3), "block", "1"),
        ((False, False, False, False), (2, 2), None, None),
    ],
)
def test_megatron_recomputes_all_or_the_first_layers_of_every_stage(
    recomputed: tuple[bool, ...], per_stage: tuple[int, ...], method: str | None, number: str | None
) -> None:
    one = LayerStrategy(dp_replicate=2)
    plan = stages(tuple(again(one) if full else one for full in recomputed), per_stage)
    if method is None and any(recomputed):
        assert options(plan)["--recompute-num-layers"] == "2", "the first stage has no more than one"
        return
    assert options(plan).get("--recompute-method") == method
    assert options(plan).get("--recompute-num-layers") == number


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            make((again(ZERO3),) * 2 + (LayerStrategy(dp_shard=8, zero=3),) * 2, ZERO3),
            r"here they are layers 0-1 \(tp 2, dp_shard 4, zero 3\) and layers 2-3 \(dp_shard 8, zero 3\)",
        ),
        (
            make((ZERO3, again(ZERO3), ZERO3, ZERO3)),
            "layer 0 recompute none, layer 1 recompute full, layers 2-3 recompute none",
        ),
        (
            stages((again(ZERO3), ZERO3, ZERO3, ZERO3), (2, 2)),
            r"different numbers of layers, and here they do \[1, 0\]",
        ),
        (make(LayerStrategy(dp_shard=8, zero=3, recompute="mlp")), "recompute=mlp as it is meant here"),
        (make(LayerStrategy(ulysses=2, cp=2, dp_replicate=2)), "ulysses=2 and cp=2"),
        (stages(ZERO3, (2, 2), schedule="zero_bubble"), "schedule=zero_bubble"),
        (stages(ZERO3, (2, 2), schedule="gpipe"), "schedule=gpipe with 4 microbatches"),
        (make(ZERO3, precision="fp32", grad_reduce_dtype="bf16"), "grad_reduce_dtype=bf16 with precision=fp32"),
    ],
)
def test_megatron_refuses_by_name(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError, match=f"Megatron-LM cannot say .*{message}"):
        to_megatron(plan)


@pytest.mark.parametrize("export", [to_torchtitan, to_megatron])
def test_an_invalid_plan_is_not_exported(export: Any) -> None:
    with pytest.raises(PlanError, match="num_microbatches=5 must divide"):
        export(make(ZERO3, num_microbatches=5))
