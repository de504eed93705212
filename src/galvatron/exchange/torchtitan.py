"""A plan as sections of a torchtitan configuration (TOML).

Takes a plan that gives all layers one strategy; gives ``[training]``, ``[parallelism]`` and
``[activation_checkpoint]``, or one sentence that names what torchtitan cannot say.  Field names and meanings are
those of ``torchtitan/config/job_config.py`` in its TOML line (2025): a data-parallel rank's ``local_batch_size`` is
one microbatch without a pipeline (what is missing to the global batch is accumulated) and all of a step with one,
which ``pipeline_parallel_microbatch_size`` cuts.
"""

from __future__ import annotations

import json

from galvatron.plan.plan import LayerStrategy, Plan

from .uniform import one_strategy, recomputed_prefixes, refuse

SYSTEM = "torchtitan"
SCHEDULES = {"1f1b": "1F1B", "gpipe": "GPipe", "interleaved": "Interleaved1F1B"}
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
RESHARD = {0: "default", 1: "never", 2: "never", 3: "always"}
"""``fsdp_reshard_after_forward``: gathered parameters stay from forward to backward (below ZeRO 3) or not."""
WHOLE_GRADIENTS = (
    "# in a pipeline gradients stay whole until the last microbatch: more memory than this plan's zero {zero}"
)
"""PyTorch's pipelining reduces an FSDP stage's gradients with its last backward alone
(``torch/distributed/pipelining/stage.py``, ``backward_maybe_with_nosync``): ZeRO 1's gradients."""


def to_torchtitan(plan: Plan) -> str:
    """The text of the sections that follow from ``plan``.

    Raises:
        PlanError: the plan is invalid, or has what torchtitan cannot say.
    """
    plan.validate()
    strategy = one_strategy(plan, SYSTEM)
    _check(plan, strategy)
    sections: dict[str, dict[str, object]] = {
        "training": _training(plan, strategy),
        "parallelism": {**_degrees(plan, strategy), **_pipeline(plan, strategy)},
        "activation_checkpoint": {"mode": strategy.recompute},
    }
    text = "\n".join(_section(name, values) for name, values in sections.items())
    waits = plan.pp > 1 and plan.num_microbatches > 1 and strategy.zero > 1
    return f"{WHOLE_GRADIENTS.format(zero=strategy.zero)}\n{text}" if waits else text


def _check(plan: Plan, strategy: LayerStrategy) -> None:
    recomputed_prefixes(plan, SYSTEM)  # refuses to recompute layers in part
    if strategy.ulysses > 1:
        raise refuse(SYSTEM, f"ulysses={strategy.ulysses} (its context parallelism exchanges keys and values)")
    if strategy.zero == 1 and plan.pp == 1:
        raise refuse(SYSTEM, "zero=1 without a pipeline (it reduces gradients into shards with every microbatch)")
    if strategy.zero == 0 and strategy.cp > 1:
        raise refuse(SYSTEM, f"cp={strategy.cp} with zero=0 (it shards parameters over context-parallel ranks)")
    inside = strategy.cp * strategy.dp_shard
    if strategy.ep > 1 and (strategy.ep % strategy.cp or inside % strategy.ep):
        raise refuse(SYSTEM, f"ep={strategy.ep} that does not lie between cp={strategy.cp} and cp x dp_shard={inside}")
    if plan.pp == 1 and plan.schedule == "gpipe" and plan.num_microbatches > 1:
        raise refuse(SYSTEM, "schedule=gpipe without a pipeline (it runs microbatches one after the other)")
    if plan.schedule not in SCHEDULES:
        raise refuse(SYSTEM, f"schedule={plan.schedule} (its zero-bubble schedules are other ones)")
    if plan.precision not in DTYPES:
        raise refuse(SYSTEM, f"precision={plan.precision} (it scales no loss)")
    if plan.grad_reduce_dtype != "fp32":
        raise refuse(SYSTEM, f"grad_reduce_dtype={plan.grad_reduce_dtype} (it sums gradients in float32)")


def _training(plan: Plan, strategy: LayerStrategy) -> dict[str, object]:
    whole = plan.global_batch_size if plan.pp > 1 else plan.micro_batch_size
    return {
        "local_batch_size": whole // strategy.dp,
        "global_batch_size": plan.global_batch_size,
        "seq_len": plan.seq_len,
        "mixed_precision_param": DTYPES[plan.precision],
        "mixed_precision_reduce": DTYPES[plan.grad_reduce_dtype],
    }


def _degrees(plan: Plan, strategy: LayerStrategy) -> dict[str, object]:
    values: dict[str, object] = {
        "data_parallel_replicate_degree": strategy.dp_replicate,
        "data_parallel_shard_degree": strategy.dp_shard,
        "fsdp_reshard_after_forward": RESHARD[strategy.zero],
        "tensor_parallel_degree": strategy.tp,
        "context_parallel_degree": strategy.cp,
    }
    if strategy.cp > 1:  # a ring sends blocks on, it does not gather them all
        values["context_parallel_rotate_method"] = "alltoall"
    values["expert_parallel_degree"] = strategy.ep
    if strategy.ep > 1:  # experts are cut by tp like all else
        values["expert_tensor_parallel_degree"] = strategy.tp
    return {**values, "pipeline_parallel_degree": plan.pp}


def _pipeline(plan: Plan, strategy: LayerStrategy) -> dict[str, object]:
    if plan.pp == 1:
        return {}
    return {
        "pipeline_parallel_schedule": SCHEDULES[plan.schedule],
        "pipeline_parallel_microbatch_size": plan.micro_batch_size // strategy.dp,
        "module_fqns_per_model_part": _modules(plan),
    }


def _modules(plan: Plan) -> list[list[str]]:
    """Module names of every model chunk, in the order of the forward pass, as torchtitan's decoders name them."""
    parts: list[list[str]] = []
    start = 0
    for length in plan.layers_per_stage:
        parts.append([f"layers.{start + i}" for i in range(length)])
        start += length
    parts[0].insert(0, "tok_embeddings")
    parts[-1] += ["norm", "output"]
    return parts


def _section(name: str, values: dict[str, object]) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]  # these JSON values are TOML too
    return "\n".join([f"[{name}]", *lines, ""])
