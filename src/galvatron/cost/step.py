"""A whole plan's step: replayed event by event, and predicted with all its parts.

Takes any valid Plan and the two profiles; gives a Replay (timeline) and a Prediction.  Knows nothing of search:
``objective_s`` is the additive form that the search minimises, for any plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from galvatron.core.hardware import HardwareProfile
from galvatron.core.model_profile import ModelProfile
from galvatron.plan.plan import Plan, Prediction, StagePrediction

from .outside import runtime_bytes
from .pipeline import Event, Pipeline, timeline
from .setting import Runtime, Setting
from .sharing import shared_timeline
from .stages import Chunk, Stage, messages_s, replicated_s, stages_of

MAX_EVENTS = 20_000
"""A longer step is replayed in part: once every stage is in its steady state each round of microbatches takes the
same time, so what is left is added at the rate of the last rounds."""

SETTLED_ROUNDS = 6
"""Rounds of pp microbatches after which the steady state has set in and the fill is over, with one to measure by."""


@dataclass(frozen=True)
class Replay:
    """One step replayed: its stages, its pipeline events and its end in seconds.

    ``is_partial``: events are of the first microbatches alone (see ``MAX_EVENTS``).
    """

    stages: tuple[Stage, ...]
    events: tuple[Event, ...]
    step_time_s: float
    is_partial: bool

    @property
    def shown_s(self) -> float:
        """What a picture of the events spans: the step, or the end of those replayed."""
        return max(event.end_s for event in self.events) if self.is_partial else self.step_time_s


def replay(plan: Plan, model: ModelProfile, hardware: HardwareProfile, runtime: Runtime = "galvatron") -> Replay:
    """Replay one step of ``plan``: pipeline, gradient sums, then the optimizer after the global gradient norm."""
    setting = Setting.of(plan, model, hardware, runtime)
    stages = stages_of(plan, setting)
    pipeline = _pipeline(plan, stages)
    events, ends = _ends(pipeline, setting)
    ends = [
        end + _total(stage, "reductions_s" if index else "last_s") + replicated_s(plan, setting, stage)
        for index, (end, stage) in enumerate(zip(ends, stages, strict=True))
    ]
    tied_s = [_total(stage, "tied_s") for stage in stages]
    synced_s = max(
        *ends, max(end for end, own_s in zip(ends, tied_s, strict=True) if own_s or not any(tied_s)) + max(tied_s)
    )
    is_partial = max(event.microbatch for event in events) + 1 < plan.num_microbatches
    return Replay(stages, events, synced_s + max(map(_optimizer_s, stages)), is_partial)


def _pipeline(plan: Plan, stages: tuple[Stage, ...]) -> Pipeline:
    chunks = [chunk for row in zip(*(stage.chunks for stage in stages), strict=True) for chunk in row]
    splits = plan.schedule == "zero_bubble"
    return Pipeline(
        plan.schedule,
        plan.pp,
        plan.num_microbatches,
        forward_s=[chunk.forward_s for chunk in chunks],
        backward_s=[chunk.backward_s - (chunk.weight_s if splits else 0.0) for chunk in chunks],
        weight_s=[chunk.weight_s for chunk in chunks] if splits else (),
        ready_s=[_total(stage, "gathers_s" if index else "first_s") for index, stage in enumerate(stages)],
        last_s=[_total(chunk, "delayed_s") for chunk in chunks],
        transfer_s=[chunk.transfer_s for chunk in chunks],
    )


def _total(part: Chunk | Stage, name: str) -> float:
    return sum(float(getattr(unit, name)) for unit in part.times)


def _ends(pipeline: Pipeline, setting: Setting) -> tuple[tuple[Event, ...], list[float]]:
    """Events, and when every stage has done its last pass."""
    pp, m, passes = pipeline.pp, pipeline.num_microbatches, 3 if pipeline.weight_s else 2
    rounds = max(MAX_EVENTS // (passes * pp * len(pipeline.forward_s)), SETTLED_ROUNDS)
    if m <= rounds * pp:
        events = _events(pipeline, setting)
        return events, _stage_ends(events, pp)
    left = (m - rounds * pp) % pp
    longer, shorter = rounds * pp + left, (rounds - 1) * pp + left
    events = _events(replace(pipeline, num_microbatches=longer), setting)
    before = _stage_ends(_events(replace(pipeline, num_microbatches=shorter), setting), pp)
    after = _stage_ends(events, pp)
    return events, [b + (b - a) * (m - longer) / (longer - shorter) for a, b in zip(before, after, strict=True)]


def _stage_ends(events: Sequence[Event], pp: int) -> list[float]:
    ends = {event.stage: event.end_s for event in events}  # each stage's are in the order of time
    return [ends[stage] for stage in range(pp)]


def _events(pipeline: Pipeline, setting: Setting) -> tuple[Event, ...]:
    fraction = setting.hardware.device.full_speed_fraction
    if pipeline.pp > 1 and fraction < 1:
        return shared_timeline(pipeline, fraction)
    return timeline(pipeline, receiving_blocks=not setting.overlaps)


def _optimizer_s(stage: Stage) -> float:
    return _total(stage, "optimizer_s")


def predict(
    plan: Plan,
    model: ModelProfile,
    hardware: HardwareProfile,
    memory_limit_bytes: int | None = None,
    runtime: Runtime = "galvatron",
) -> Prediction:
    """Step time and memory of ``plan``, each with its parts, where ``runtime`` runs it.

    Raises:
        PlanError: the plan breaks a rule of its model or world.
        ProfileError: a profile lacks a measurement that the plan needs.
    """
    plan.validate(model.spec, hardware.world_size)
    setting, replayed = Setting.of(plan, model, hardware, runtime), replay(plan, model, hardware, runtime)
    stages = [stage_prediction(plan, setting, stage) for stage in replayed.stages]
    return Prediction(
        step_time_s=replayed.step_time_s,
        parts_s=_parts(plan, setting, replayed),
        stages=tuple(stages),
        memory_limit_bytes=memory_limit_bytes,
        compiled=model.compiled,
    )


def stage_prediction(plan: Plan, setting: Setting, stage: Stage) -> StagePrediction:
    """Memory of one stage: what stays, the microbatches in flight, and the largest transient of its units.

    The lower end is what is surely alive at once, without anything that comes and goes.
    """
    units = stage.memories
    resident = sum(int(unit.resident_bytes) for unit in units)
    activations = stage.activation_bytes
    workspace = max(int(unit.transient_bytes) for unit in units) + sum(chunk.sent_bytes for chunk in stage.chunks)
    gradients = sum(int(unit.gradient_bytes) for unit in units)
    tensors = resident + activations + workspace
    # gradients meet all the activations in flight only if an earlier microbatch has left them behind
    meets = plan.num_microbatches > max(chunk.in_flight.alive for chunk in stage.chunks)
    # of several chunks the fullest moment is known, but sure is only what one of them holds
    sure = min(max(chunk.sure_bytes for chunk in stage.chunks), activations)
    runtime = runtime_bytes(setting, tensors)
    return StagePrediction(
        parameter_bytes=sum(int(unit.parameter_bytes) for unit in units),
        gradient_bytes=gradients,
        optimizer_bytes=sum(int(unit.optimizer_bytes) for unit in units),
        unsharded_bytes=sum(int(unit.unsharded_bytes) for unit in units),
        activation_bytes=activations,
        workspace_bytes=workspace,
        runtime_bytes=runtime,
        low_memory_bytes=resident + sure - (0 if meets else gradients),
        peak_memory_bytes=tensors + runtime,
        microbatch_forward_s=stage.forward_s,
        microbatch_backward_s=stage.backward_s,
    )


def _parts(plan: Plan, setting: Setting, replayed: Replay) -> dict[str, float]:
    """The step split by what the busiest stage does; what it waits for is the bubble, so parts sum to the step."""
    busy = [(_stage_parts(plan, setting, replayed, index), -index) for index in range(plan.pp)]
    parts, _ = max(busy, key=lambda item: (sum(item[0].values()), item[1]))
    hurry = min(replayed.step_time_s / sum(parts.values()), 1.0)  # below 1 only where ranks share cores
    parts = {name: hurry * seconds for name, seconds in parts.items()}
    idle = replayed.step_time_s - sum(parts.values())
    if setting.overlaps:  # transfers run beside compute, but the first and last microbatch wait for all of them
        transfers = sum(chunk.transfer_s for stage in replayed.stages for chunk in stage.chunks)
        parts["pipeline_p2p"] = max(min(idle, 2 * transfers), 0.0)
    parts["pipeline_bubble"] = max(replayed.step_time_s - sum(parts.values()), 0.0)
    return {name: parts[name] for name in PART_NAMES}


PART_NAMES = (
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
)


def _stage_parts(plan: Plan, setting: Setting, replayed: Replay, index: int) -> dict[str, float]:
    """Seconds that one stage is busy in a step, by cause."""
    stage, m = replayed.stages[index], plan.num_microbatches

    def microbatches(*names: str) -> float:
        return m * sum(_total(stage, name) for name in names)

    received_s = 0.0 if setting.overlaps else m * sum(messages_s(replayed.stages, index))
    return {
        "compute": microbatches("compute_forward_s", "compute_backward_s"),
        "tensor_parallel": microbatches("tensor_parallel_forward_s", "tensor_parallel_backward_s")
        + replicated_s(plan, setting, stage),
        "context_parallel": microbatches("context_parallel_forward_s", "context_parallel_backward_s"),
        "expert_parallel": microbatches("expert_parallel_forward_s", "expert_parallel_backward_s"),
        "data_parallel": microbatches("data_parallel_forward_s", "data_parallel_backward_s")
        + sum(_total(stage, name) for name in ("first_s", "last_s", "delayed_s", "tied_s")),
        "recompute": microbatches("recompute_s"),
        "redistribution": m * 2 * stage.redistribution_s,
        "pipeline_p2p": received_s,
        "optimizer": _optimizer_s(stage),
    }


def objective_s(plan: Plan, setting: Setting) -> float:
    """The additive form (``Setting.combined_s``) over stages, w = the stage's ``UnitTimes.work_s``.

    A stage's microbatch counts its redistributions both ways and what it receives from its neighbours too.
    """
    stages, works = stages_of(plan, setting, joined=False), []
    for index, stage in enumerate(stages):
        moved_s = 2 * setting.whole_fill * stage.redistribution_s
        received_s = sum(setting.received_s(seconds) for seconds in messages_s(stages, index))
        works.append(sum(float(unit.work_s(setting)) for unit in stage.times) + moved_s + received_s)
    return float(setting.combined_s(sum(works), max(works)))
