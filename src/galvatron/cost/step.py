"""A whole plan's step: replayed event by event, and predicted with all its parts.

Takes any valid Plan and the two profiles; gives a Replay (timeline) and a Prediction.  Knows nothing of search:
``objective_s`` is the additive form that the search minimises, for any plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from galvatron.core.hardware import HardwareProfile
from galvatron.core.model import ModelProfile, UnitName
from galvatron.plan.plan import LayerStrategy, Plan, Prediction, StagePrediction

from .communication import redistribution_s, transfer_s
from .memory import UnitMemory, runtime_bytes, stage_bytes, unit_memory
from .pipeline import Event, timeline
from .setting import Setting
from .sharing import Seconds, shared_timeline
from .unit import UnitTimes, unit_times


@dataclass(frozen=True)
class Stage:
    """One stage's units in forward order, and one microbatch's redistribution seconds each way."""

    units: tuple[tuple[UnitName, LayerStrategy], ...]
    times: tuple[UnitTimes, ...]
    memories: tuple[UnitMemory, ...]
    redistribution_s: float

    @property
    def forward_s(self) -> float:
        """One microbatch's forward."""
        return sum(unit.forward_s for unit in self.times) + self.redistribution_s

    @property
    def backward_s(self) -> float:
        """One microbatch's backward."""
        return sum(unit.backward_s for unit in self.times) + self.redistribution_s


@dataclass(frozen=True)
class Replay:
    """One step replayed: its stages, its pipeline events and its end in seconds."""

    stages: tuple[Stage, ...]
    events: tuple[Event, ...]
    step_time_s: float


def stages_of(plan: Plan, setting: Setting) -> tuple[Stage, ...]:
    """Every stage of ``plan`` with its costs; a stage's first unit redistributes what its neighbour sent."""
    costs: dict[tuple[UnitName, LayerStrategy], tuple[UnitTimes, UnitMemory]] = {}
    stages, layout = [], plan.embedding.sequence_degree
    for index in range(plan.pp):
        units = _units(plan, index)
        moved_s = 0.0
        for key in units:
            if key not in costs:
                costs[key] = (unit_times(setting, *key), unit_memory(setting, *key))
            moved_s += redistribution_s(setting, layout, key[1].sequence_degree)
            layout = key[1].sequence_degree
        times, memories = zip(*(costs[key] for key in units), strict=True)
        stages.append(Stage(units, times, memories, moved_s))
    return tuple(stages)


def _units(plan: Plan, stage: int) -> tuple[tuple[UnitName, LayerStrategy], ...]:
    units: list[tuple[UnitName, LayerStrategy]] = [("layer", plan.layers[i]) for i in plan.stage_layers(stage)]
    if stage == 0:
        units.insert(0, ("embedding", plan.embedding))
    if stage == plan.pp - 1:
        units.append(("head", plan.head))
    return tuple(units)


def replay(plan: Plan, model: ModelProfile, hardware: HardwareProfile) -> Replay:
    """Replay one step of ``plan``: pipeline, gradient sums, then the optimizer after the global gradient norm."""
    setting = Setting.of(plan, model, hardware)
    stages, m = stages_of(plan, setting), plan.num_microbatches
    forward_s = [[stage.forward_s] * m for stage in stages]
    backward_s = [[stage.backward_s] * m for stage in stages]
    for stage, forwards, backwards in zip(stages, forward_s, backward_s, strict=True):
        forwards[0] += sum(unit.first_s for unit in stage.times)
        backwards[-1] += sum(unit.last_s for unit in stage.times)
    events = _events(plan, setting, forward_s, backward_s)
    ends = [max(event.end_s for event in events if event.stage == index) for index in range(plan.pp)]
    ends = [end + _replicated_s(setting, stage) for end, stage in zip(ends, stages, strict=True)]
    tied_s = max(stages[0].times[0].tied_s, stages[-1].times[-1].tied_s)
    synced_s = max(*ends, max(ends[0], ends[-1]) + tied_s)
    return Replay(stages, events, synced_s + max(map(_optimizer_s, stages)))


def _events(plan: Plan, setting: Setting, forward_s: Seconds, backward_s: Seconds) -> tuple[Event, ...]:
    fraction = setting.hardware.device.full_speed_fraction
    if plan.pp > 1 and fraction < 1:
        return shared_timeline(plan.schedule, forward_s, backward_s, transfer_s(setting), fraction)
    return timeline(plan.schedule, forward_s, backward_s, transfer_s(setting), receiving_blocks=not setting.overlaps)


def _replicated_s(setting: Setting, stage: Stage) -> float:
    """One all-reduce for each tp degree of the stage: every unit's bytes, one latency."""
    degrees = {strategy.tp for _, strategy in stage.units} - {1}
    latencies = sum(setting.link("all_reduce", tp, 1).latency_s for tp in degrees)
    return latencies + sum(unit.replicated_s for unit in stage.times)


def _optimizer_s(stage: Stage) -> float:
    return sum(unit.optimizer_s for unit in stage.times)


def predict(
    plan: Plan, model: ModelProfile, hardware: HardwareProfile, memory_limit_bytes: int | None = None
) -> Prediction:
    """Step time and memory of ``plan``, each with its parts.

    Raises:
        PlanError: the plan breaks a rule of its model or world.
        ProfileError: a profile lacks a measurement that the plan needs.
    """
    plan.validate(model.spec, hardware.world_size)
    setting, replayed = Setting.of(plan, model, hardware), replay(plan, model, hardware)
    stages = [stage_prediction(plan, setting, index, stage) for index, stage in enumerate(replayed.stages)]
    return Prediction(
        step_time_s=replayed.step_time_s,
        parts_s=_parts(plan, setting, replayed),
        stages=tuple(stages),
        memory_limit_bytes=memory_limit_bytes,
    )


def stage_prediction(plan: Plan, setting: Setting, index: int, stage: Stage) -> StagePrediction:
    """Memory of one stage: what stays, the microbatches in flight, and the largest transient of its units.

    The lower end is what is surely alive at once, without anything that comes and goes.
    """
    units = stage.memories
    resident = sum(unit.resident_bytes for unit in units)
    microbatch = sum(unit.activation_bytes for unit in units) + stage_bytes(setting, index)
    activations = plan.microbatches_in_flight(index) * microbatch
    workspace = max(unit.transient_bytes for unit in units)
    tensors = resident + activations + workspace
    # gradients meet all the activations in flight only if an earlier microbatch has left them behind
    meets = plan.num_microbatches > plan.microbatches_in_flight(index)
    late = 0 if meets else sum(unit.gradient_bytes for unit in units)
    runtime = runtime_bytes(setting, tensors)
    return StagePrediction(
        parameter_bytes=sum(unit.parameter_bytes for unit in units),
        gradient_bytes=sum(unit.gradient_bytes for unit in units),
        optimizer_bytes=sum(unit.optimizer_bytes for unit in units),
        unsharded_bytes=sum(unit.unsharded_bytes for unit in units),
        activation_bytes=activations,
        workspace_bytes=workspace,
        runtime_bytes=runtime,
        low_memory_bytes=resident + activations - late,
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
        parts["pipeline_p2p"] = min(idle, 2 * (plan.pp - 1) * transfer_s(setting))
    parts["pipeline_bubble"] = max(replayed.step_time_s - sum(parts.values()), 0.0)
    return {name: parts[name] for name in PART_NAMES}


PART_NAMES = (
    "compute",
    "tensor_parallel",
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
    tensor = sum(t.tensor_parallel_forward_s + t.tensor_parallel_backward_s for t in stage.times)
    data = sum(t.data_parallel_forward_s + t.data_parallel_backward_s for t in stage.times)
    receives = (index > 0) + (index < plan.pp - 1)
    return {
        "compute": m * sum(t.compute_forward_s + t.compute_backward_s for t in stage.times),
        "tensor_parallel": m * tensor + _replicated_s(setting, stage),
        "data_parallel": m * data + sum(t.first_s + t.last_s + t.tied_s for t in stage.times),
        "recompute": m * sum(t.recompute_s for t in stage.times),
        "redistribution": m * 2 * stage.redistribution_s,
        "pipeline_p2p": 0.0 if setting.overlaps else m * receives * transfer_s(setting),
        "optimizer": _optimizer_s(stage),
    }


def objective_s(plan: Plan, setting: Setting) -> float:
    """The additive form (``Setting.combined_s``) over stages, w = the stage's ``UnitTimes.work_s``.

    A stage's microbatch counts its redistributions both ways and what it receives from its neighbours too.
    """
    works = []
    for index, stage in enumerate(stages_of(plan, setting)):
        receives = (index > 0) + (index < plan.pp - 1)
        moved_s = 2 * stage.redistribution_s + receives * transfer_s(setting)
        works.append(sum(unit.work_s(setting) for unit in stage.times) + moved_s)
    return float(setting.combined_s(sum(works), max(works)))
