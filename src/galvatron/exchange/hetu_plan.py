"""Hetu-Galvatron's plan file, both ways.

Takes its JSON text and what it leaves out (world, sequence length, precision); gives a Plan.  Takes a Plan; gives
its JSON text, or one sentence that names what that format cannot say.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, PositiveInt

from galvatron.core.errors import PlanError
from galvatron.core.model import ModelSpec, Precision
from galvatron.core.records import Record, dump_json, validate
from galvatron.plan.axes import divisors
from galvatron.plan.hetu import SCHEDULES, DataParallel, data_parallel_types, inexpressible
from galvatron.plan.plan import LayerStrategy, Plan

Flag = Literal[0, 1]
ZERO: dict[DataParallel, Literal[0, 2, 3]] = {"ddp": 0, "zero2": 2, "zero3": 3}


class HetuPlan(Record):
    """The file: lists are joined by commas; older files leave ``use_sp`` and what concerns the vocabulary out."""

    pp_deg: PositiveInt
    tp_sizes_enc: str
    tp_consecutive_flags: str | None = None
    dp_types_enc: str
    use_sp: str | None = None
    checkpoint: str | None = None
    global_bsz: PositiveInt
    chunks: PositiveInt
    pp_division: str
    pipeline_type: Literal["gpipe", "pipedream_flush"]
    default_dp_type: DataParallel
    vtp: PositiveInt = 1
    vsp: Flag = 0
    embed_sdp: Flag = Field(default=0)


def import_plan(
    text: str,
    world_size: int,
    seq_len: int,
    spec: ModelSpec | None = None,
    precision: Precision = "bf16",
    model: str = "model",
    source: str = "the plan",
) -> Plan:
    """The plan in ``text``; ``model`` names it where there is no ``spec``, ``source`` names the file in errors.

    Raises:
        PlanError: the text is malformed, says what plans cannot, or breaks a rule of its model or world.
    """
    file = _parse(text, source)
    if file.global_bsz % file.chunks:
        raise PlanError(
            f"{source}: chunks={file.chunks} must divide global_bsz={file.global_bsz}, for microbatches are equal; "
            f"set chunks to {_nearest_divisors(file.chunks, file.global_bsz)}, or change global_bsz"
        )
    if world_size % file.pp_deg:
        raise PlanError(
            f"{source}: pp_deg={file.pp_deg} must divide world_size={world_size}; give the plan's world size"
        )
    size = world_size // file.pp_deg
    default = ZERO[file.default_dp_type]
    ends = _strategy(source, size, file.vtp, bool(file.vsp), 3 if file.embed_sdp else default, False)
    plan = Plan(
        model=model if spec is None else spec.name,
        world_size=world_size,
        layers_per_stage=tuple(_numbers(source, "pp_division", file.pp_division)),
        schedule=SCHEDULES[file.pipeline_type],
        num_microbatches=file.chunks,
        global_batch_size=file.global_bsz,
        seq_len=seq_len,
        precision=precision,
        embedding=ends,
        layers=_layers(file, source, size),
        head=ends,
    )
    if plan.pp != file.pp_deg:
        raise PlanError(
            f"{source}: pp_division must list pp_deg={file.pp_deg} stages, got {plan.pp}; change one of them"
        )
    plan.validate(spec)
    return plan


def _nearest_divisors(number: int, of: int) -> str:
    """The divisors of ``of`` next below and next above ``number``, for people."""
    below = [divisor for divisor in divisors(of) if divisor < number][-1:]
    above = [divisor for divisor in divisors(of) if divisor > number][:1]
    return " or ".join(map(str, below + above))


def _parse(text: str, source: str) -> HetuPlan:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError(f"{source} is not JSON ({error}); give a plan that Hetu-Galvatron wrote") from None
    return validate(HetuPlan, data, source, PlanError)


def _layers(file: HetuPlan, source: str, stage_size: int) -> tuple[LayerStrategy, ...]:
    degrees = _numbers(source, "tp_sizes_enc", file.tp_sizes_enc)

    def flags(name: str, text: str | None, default: int) -> list[int]:
        values = [default] * len(degrees) if text is None else _numbers(source, name, text)
        if len(values) != len(degrees) or not set(values) <= {0, 1}:
            raise PlanError(f"{source}: {name} must be {len(degrees)} values of 0 or 1, one a layer; mend that list")
        return values

    if not all(flags("tp_consecutive_flags", file.tp_consecutive_flags, 1)):
        raise PlanError(
            f"{source}: tp_consecutive_flags must be 1 for every layer, for tensor parallelism uses neighbouring "
            "ranks here; set them to 1"
        )
    sharded = flags("dp_types_enc", file.dp_types_enc, 0)
    ulysses, recomputed = flags("use_sp", file.use_sp, 0), flags("checkpoint", file.checkpoint, 0)
    return tuple(
        _strategy(source, stage_size, degree, bool(sp), 3 if shard else ZERO[file.default_dp_type], bool(again))
        for degree, sp, shard, again in zip(degrees, ulysses, sharded, recomputed, strict=True)
    )


def _strategy(
    source: str, stage_size: int, degree: int, ulysses: bool, zero: Literal[0, 2, 3], recompute: bool
) -> LayerStrategy:
    """One layer's strategy; ZeRO on ranks that hold nothing twice is no ZeRO."""
    if degree < 1 or stage_size % degree:
        raise PlanError(
            f"{source}: a tensor or sequence degree of {degree} must divide the {stage_size} devices of a stage; "
            f"choose {', '.join(map(str, divisors(stage_size)))}"
        )
    dp = stage_size // degree
    shards = zero > 0 and (dp > 1 or (ulysses and degree > 1))
    return LayerStrategy(
        tp=1 if ulysses else degree,
        ulysses=degree if ulysses else 1,
        dp_shard=dp if shards else 1,
        dp_replicate=1 if shards else dp,
        zero=zero if shards else 0,
        recompute="full" if recompute else "none",
    )


def _numbers(source: str, name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise PlanError(f"{source}: {name} must be whole numbers joined by commas, got {text!r}; mend that list")
    return [int(part) for part in parts]


def export_plan(plan: Plan) -> str:
    """The text of Hetu-Galvatron's plan file.

    Raises:
        PlanError: the plan is invalid, or has what that format cannot say.
    """
    plan.validate()
    problem = inexpressible(plan)
    if problem:
        raise PlanError(f"a plan of Hetu-Galvatron cannot say {problem}; search a plan with --space hetu")
    default: DataParallel = "ddp" if data_parallel_types(plan) & {"ddp"} else "zero2"
    layers = plan.layers
    file = HetuPlan(
        pp_deg=plan.pp,
        tp_sizes_enc=_joined(max(s.tp, s.ulysses) for s in layers),
        tp_consecutive_flags=_joined(1 for _ in layers),
        dp_types_enc=_joined(int(s.zero == 3) for s in layers),
        use_sp=_joined(int(s.ulysses > 1) for s in layers),
        checkpoint=_joined(int(s.recompute == "full") for s in layers),
        global_bsz=plan.global_batch_size,
        chunks=plan.num_microbatches,
        pp_division=_joined(plan.layers_per_stage),
        pipeline_type="gpipe" if plan.schedule == "gpipe" else "pipedream_flush",
        default_dp_type=default,
        vtp=max(plan.embedding.tp, plan.embedding.ulysses),
        vsp=int(plan.embedding.ulysses > 1),
        embed_sdp=int(plan.embedding.zero == 3),
    )
    return dump_json(file.model_dump())


def _joined(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))
