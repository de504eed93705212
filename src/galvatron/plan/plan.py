"""Plan, LayerStrategy and the prediction a plan carries (``plan.json``).

In the file, runs of equal layers are one entry: ``{"layers": "0-11", "tp": 2, "dp_shard": 4, "zero": 3}``.
"""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StrictBool, ValidationError, field_serializer, field_validator, model_validator

from galvatron.core.defects import sentence
from galvatron.core.errors import GalvatronError, PlanError
from galvatron.core.model import ModelSpec, Offload, Precision, Recompute, ReduceDtype
from galvatron.core.numbers import (
    MAX_LAYERS,
    Bytes,
    Devices,
    Finite,
    Layers,
    Seconds,
    Sequences,
    Tokens,
    Whole,
)
from galvatron.core.records import FileRecord, Record
from galvatron.core.units import counted, plural
from galvatron.core.words import shown

from .axes import StageAxes

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]
SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved", "zero_bubble")
Part = Literal[
    "compute",
    "tensor_parallel",
    "context_parallel",
    "expert_parallel",
    "data_parallel",
    "recompute",
    "redistribution",
    "pipeline_p2p",
    "pipeline_bubble",
    "optimizer",
]
EXAMPLE_RUN = '{"layers": "0-11", "tp": 2}'


class LayerStrategy(Record):
    """How one layer uses the devices of its stage; the degrees' product is the stage's size.

    tp has Megatron sequence parallelism; ``zero`` says what is sharded over the axes of ulysses, cp and ``dp_shard``:
    optimizer (1), + gradients (2), + parameters (3), or nothing (0, with ``dp_shard`` 1).  ``ep`` deals experts to
    the axes next to tp's, whatever their other role.  ``offload`` keeps AdamW's moments in host memory.  Hashable,
    canonical: equal meaning is equal value.
    """

    tp: Devices = 1
    ulysses: Devices = 1
    cp: Devices = 1
    ep: Devices = 1
    dp_shard: Devices = 1
    dp_replicate: Devices = 1
    zero: Literal[0, 1, 2, 3] = 0
    recompute: Recompute = "none"
    offload: Offload = "none"

    @model_validator(mode="after")
    def _zero_matches_shard(self) -> Self:
        if (self.zero == 0 and self.dp_shard > 1) or (self.zero > 0 and self.ulysses * self.cp * self.dp_shard == 1):
            raise ValueError(
                f"zero={self.zero} goes with dp_shard={self.dp_shard} only if both or neither shard; "
                "use zero 1, 2 or 3 with dp_shard > 1 (or ulysses or cp > 1), and zero 0 with dp_shard 1"
            )
        return self

    @property
    def sequence_degree(self) -> int:
        """In how many chunks hidden states are cut along the sequence between layers."""
        return self.tp * self.ulysses * self.cp

    @property
    def dp(self) -> int:
        """In how many chunks hidden states are cut along the batch between layers."""
        return self.dp_shard * self.dp_replicate

    @property
    def num_devices(self) -> int:
        """The devices of a stage that this strategy fills."""
        return self.sequence_degree * self.dp

    @property
    def shard_degree(self) -> int:
        """Over how many ranks ZeRO shards what is equal on them."""
        return self.ulysses * self.cp * self.dp_shard if self.zero else 1

    @property
    def replicated(self) -> LayerStrategy:
        """The same tensor parallelism with nothing sharded."""
        return LayerStrategy(tp=self.tp, dp_replicate=self.num_devices // self.tp, offload=self.offload)

    @property
    def of_experts(self) -> LayerStrategy:
        """How parameters of experts lie: ep's ranks hold different ones, and ZeRO shards over what is left of its own.

        As a strategy whose tp is tp x ep: of what tells its ranks apart, not of what cuts a matrix.
        """
        inner, shard = self.tp * self.ep, max(self.shard_degree // self.ep, 1)
        replicas = self.num_devices // (inner * shard)
        return LayerStrategy(tp=inner, dp_shard=shard, dp_replicate=replicas, zero=self.zero if shard > 1 else 0)

    def __str__(self) -> str:
        degrees = ("tp", "ulysses", "cp", "ep", "dp_shard", "dp_replicate")
        parts = [f"{name} {getattr(self, name)}" for name in degrees if getattr(self, name) > 1]
        if self.zero:
            parts.append(f"zero {self.zero}")
        if self.recompute != "none":
            parts.append(f"recompute {self.recompute}")
        if self.offload != "none":
            parts.append(f"offload {self.offload}")
        return ", ".join(parts) or "one device"


class StagePrediction(Record):
    """Predicted peak bytes of the fullest rank of a stage, by part, with the interval's lower end.

    ``low_memory_bytes`` is surely alive at once; ``peak_memory_bytes`` is the upper end, held against the limit.
    """

    parameter_bytes: Bytes
    gradient_bytes: Bytes
    optimizer_bytes: Bytes
    unsharded_bytes: Bytes
    activation_bytes: Bytes
    workspace_bytes: Bytes
    runtime_bytes: Bytes
    low_memory_bytes: Bytes
    peak_memory_bytes: Bytes
    microbatch_forward_s: Seconds
    microbatch_backward_s: Seconds


class Proof(Record):
    """What the search can prove: its best additive objective, a bound of all plans' of the space, and the gap."""

    objective_s: Seconds
    lower_bound_s: Seconds
    gap: Finite
    num_candidates: Whole
    cpu_s: Seconds


class Prediction(Record):
    """What a plan promises; ``parts_s`` splits the step; ``compiled``: of layers that are, as the profile's were."""

    step_time_s: Annotated[Seconds, Field(gt=0)]
    parts_s: dict[Part, Finite]
    stages: tuple[StagePrediction, ...] = Field(min_length=1)
    memory_limit_bytes: Bytes | None = None
    compiled: StrictBool = False
    proof: Proof | None = None

    @property
    def peak_memory_bytes(self) -> int:
        """The fullest stage's upper end."""
        return max(stage.peak_memory_bytes for stage in self.stages)

    def unlike(self, *, compiled: bool) -> str | None:
        """Where layers that are (not) ``compiled`` are not what was predicted: a sentence; None where they are."""
        if compiled == self.compiled:
            return None
        here, there = ("compiled", "not compiled")[:: 1 if compiled else -1]
        return (
            f"layers are {here} here but {there} in what the plan predicts, so that time and memory differ; "
            f"set compile = {'true' if self.compiled else 'false'}, or search with a profile of such layers"
        )


class Plan(FileRecord):
    """A whole run: the pipeline, the batch and every layer's strategy.

    ``layers_per_stage`` counts layers in the order of the forward pass.  An interleaved schedule cuts the model into
    ``model_chunks`` chunks a stage, and zero bubble may: chunk c of stage p is entry c x pp + p.  ``what_if`` names
    what the runtime cannot run yet; such a plan is for planning alone.
    """

    FORMAT: ClassVar[str] = "galvatron.plan"
    ERROR: ClassVar[type[GalvatronError]] = PlanError

    model: str
    world_size: Devices
    layers_per_stage: tuple[Layers, ...] = Field(min_length=1)
    schedule: Schedule = "1f1b"
    model_chunks: Layers = 1
    num_microbatches: Sequences = 1
    global_batch_size: Sequences
    seq_len: Tokens
    precision: Precision = "fp32"
    grad_reduce_dtype: ReduceDtype = "fp32"
    embedding: LayerStrategy
    layers: tuple[LayerStrategy, ...]
    head: LayerStrategy
    what_if: tuple[str, ...] = ()
    prediction: Prediction | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _expand_runs(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or all(isinstance(run, LayerStrategy) for run in value):
            return value
        layers: list[LayerStrategy] = []
        wrong: list[str] = []
        for run in value:
            if not isinstance(run, dict):
                raise ValueError(f"a run of layers must be an object such as {EXAMPLE_RUN}, got {shown(run)}")
            fields = dict(run)
            first, last = _parse_range(fields.pop("layers", None))
            if first != len(layers):
                raise ValueError(
                    f"runs of layers must follow each other; expected one from layer {len(layers)}, got {first}"
                )
            layers += [_of_run(run["layers"], fields, wrong)] * (last - first + 1)
        if wrong:
            raise ValueError("; ".join(wrong))
        return layers

    @field_serializer("layers", mode="plain")
    def _collapse_runs(self, value: tuple[LayerStrategy, ...]) -> list[dict[str, Any]]:
        return [
            {"layers": f"{first}-{last}" if last > first else str(first), **strategy.model_dump(exclude_defaults=True)}
            for first, last, strategy in runs(value)
        ]

    @property
    def pp(self) -> int:
        """Number of pipeline stages."""
        return len(self.layers_per_stage) // self.model_chunks

    @property
    def stage_size(self) -> int:
        """Devices per stage."""
        return self.world_size // self.pp

    @property
    def axes(self) -> StageAxes:
        """The rank arithmetic of one stage."""
        return StageAxes(self.stage_size)

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one microbatch, over all data-parallel ranks."""
        return self.global_batch_size // self.num_microbatches

    def chunk_layers(self, stage: int, chunk: int = 0) -> range:
        """Global indices of the layers of one model chunk of ``stage``."""
        entry = chunk * self.pp + stage
        start = sum(self.layers_per_stage[:entry])
        return range(start, start + self.layers_per_stage[entry])

    def strategies(self) -> tuple[LayerStrategy, ...]:
        """Embedding, every layer, head: in the order of the forward pass."""
        return (self.embedding, *self.layers, self.head)

    def microbatches_in_flight(self, stage: int, chunk: int = 0) -> int:
        """Microbatches whose activations a chunk of ``stage`` holds at its peak."""
        from .schedules import in_flight

        return in_flight(self.schedule, self.pp, stage, self.num_microbatches, self.model_chunks)[chunk].alive

    def validate(self, spec: ModelSpec | None = None, world_size: int | None = None) -> None:  # type: ignore[override]
        """Raise PlanError at the first rule that the plan breaks (see ``plan.rules``)."""
        from .rules import check_plan

        check_plan(self, spec, world_size)

    def describe_stages(self) -> str:
        """``2 stages of 3+1 layers``."""
        chunks = f" in {self.model_chunks} chunks each" if self.model_chunks > 1 else ""
        layers = f"{counts(self.layers_per_stage)} {plural(len(self.layers), 'layer')}"
        return f"{counted(self.pp, 'stage')} of {layers}{chunks}"

    def describe(self) -> str:
        """The plan for people, one line a run of equal layers."""
        lines = [
            f"{counted(self.world_size, 'device')}, {self.describe_stages()}, {self.schedule}, "
            f"{counted(self.num_microbatches, 'microbatch')} of {counted(self.micro_batch_size, 'sequence')} x "
            f"{counted(self.seq_len, 'token')}, {self.precision}",
            f"embedding: {self.embedding}",
        ]
        for first, last, strategy in runs(self.layers):
            lines.append(f"layers {first}-{last}: {strategy}" if last > first else f"layer {first}: {strategy}")
        lines.append(f"head: {self.head}")
        if self.what_if:
            lines.append(f"what-if plan: the runtime cannot run it ({'; '.join(self.what_if)})")
        return "\n".join(lines)


def counts(numbers: tuple[int, ...]) -> str:
    """``3+1`` for short lists, runs of equal numbers as ``7x14+6`` (7 times 14) for long ones."""
    if len(numbers) <= 8:
        return "+".join(map(str, numbers))
    grouped = [(number, len(list(members))) for number, members in itertools.groupby(numbers)]
    return "+".join(f"{count}x{number}" if count > 1 else str(number) for number, count in grouped)


def _of_run(name: str, fields: dict[str, Any], wrong: list[str]) -> LayerStrategy:
    """The strategy of run ``name``, said once for all its layers; what is wrong with it is added to ``wrong``."""
    try:
        return LayerStrategy.model_validate(fields)
    except ValidationError as failure:
        wrong.append(f'in the run "{name}", {sentence(LayerStrategy, failure)}')
        return LayerStrategy()


def runs(layers: tuple[LayerStrategy, ...]) -> list[tuple[int, int, LayerStrategy]]:
    """Runs of equal neighbours as (first index, last index, strategy)."""
    result, start = [], 0
    for strategy, members in itertools.groupby(layers):
        count = len(list(members))
        result.append((start, start + count - 1, strategy))
        start += count
    return result


def _parse_range(text: object) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text, re.ASCII) if isinstance(text, str) else None
    first, last = (-1, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
    if not 0 <= first <= last < MAX_LAYERS:
        raise ValueError(
            f'a run needs "layers": "first-last" such as "0-11", below layer {MAX_LAYERS:,}, got {shown(text)}'
        )
    return first, last
