"""A plan's stages with their units' costs: the nouns that ``step`` adds up.

Takes a Plan and its Setting; gives stages of chunks of units.  Knows nothing of timelines or search.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from galvatron.core.model import ENDS, UnitName
from galvatron.plan.plan import LayerStrategy, Plan
from galvatron.plan.schedules import InFlight, held_at_once, in_flight, on_their_way

from .between import joined_times, layouts, sides_s, without_tied
from .communication import redistribution_s, transfer_s
from .joints import joined_memories, side_bytes
from .memory import UnitMemory, all_unit_memory, shared_bytes, tables_share
from .setting import Setting
from .strategies import Strategies
from .unit import UnitTimes, all_unit_times

Units = tuple[tuple[UnitName, LayerStrategy], ...]


@dataclass(frozen=True)
class Chunk:
    """Units that follow each other on one stage, in forward order.

    ``redistribution_s``: one microbatch's, one way; a chunk's first unit redistributes what its neighbour sent.
    ``transfer_s``: the message into the chunk.  ``beside_bytes``: what a microbatch in flight keeps beyond its units'
    activations: the output, until the backward (the next profile does not count it), and what layers share, of which
    every chunk but the first makes its own.  ``sent_bytes``: the gradients of the chunk's inputs that may still be on
    their way while later microbatches pass.  ``memories``: of its units, and of what joins stacks (``cost.joints``).
    """

    units: Units
    times: tuple[UnitTimes, ...]
    memories: tuple[UnitMemory, ...]
    redistribution_s: float
    transfer_s: float
    beside_bytes: int
    sent_bytes: int
    in_flight: InFlight
    layers: range = range(0)

    @cached_property
    def forward_s(self) -> float:
        """One microbatch's forward."""
        return sum(float(unit.forward_s) for unit in self.times) + self.redistribution_s

    @cached_property
    def backward_s(self) -> float:
        """One microbatch's backward, weight gradients included."""
        return sum(float(unit.backward_s) for unit in self.times) + self.redistribution_s

    @cached_property
    def weight_s(self) -> float:
        """The part of the backward that zero bubble puts off."""
        return sum(float(unit.weight_s) for unit in self.times)

    @property
    def activation_bytes(self) -> int:
        """Of all microbatches in flight: activations, and what weight passes need."""
        alive = self.in_flight.alive * self.beside_bytes
        return alive + sum(int(unit.held_bytes(self.in_flight)) for unit in self.memories)

    @cached_property
    def each_bytes(self) -> tuple[int, int]:
        """Of one microbatch: while it is alive, and while its weight pass waits."""
        alive = self.beside_bytes + sum(int(unit.activation_bytes) for unit in self.memories)
        return alive, sum(int(unit.waiting_bytes) for unit in self.memories)

    @property
    def sure_bytes(self) -> int:
        """What of that is surely alive at once."""
        sure = InFlight(self.in_flight.alive, self.in_flight.waiting)
        return replace(self, in_flight=sure).activation_bytes


@dataclass(frozen=True)
class Stage:
    """The chunks of one stage, and the ``moments`` at which several may hold the most (``plan.schedules``)."""

    chunks: tuple[Chunk, ...]
    moments: tuple[tuple[tuple[int, int], ...], ...] = ()

    @cached_property
    def activation_bytes(self) -> int:
        """Of all microbatches in flight, at the fullest moment."""
        if not self.moments:
            return sum(chunk.activation_bytes for chunk in self.chunks)
        alive, waiting = np.array([chunk.each_bytes for chunk in self.chunks], dtype=np.int64).T
        held = np.array(self.moments, dtype=np.int64)
        return int((held[..., 0] @ alive + held[..., 1] @ waiting).max())

    @cached_property
    def times(self) -> tuple[UnitTimes, ...]:
        """Of all its units."""
        return tuple(unit for chunk in self.chunks for unit in chunk.times)

    @cached_property
    def memories(self) -> tuple[UnitMemory, ...]:
        """Of all its units."""
        return tuple(unit for chunk in self.chunks for unit in chunk.memories)

    @property
    def units(self) -> Units:
        """All its units with their strategies."""
        return tuple(unit for chunk in self.chunks for unit in chunk.units)

    @property
    def forward_s(self) -> float:
        """One microbatch's forward through all chunks."""
        return sum(chunk.forward_s for chunk in self.chunks)

    @property
    def backward_s(self) -> float:
        """One microbatch's backward through all chunks."""
        return sum(chunk.backward_s for chunk in self.chunks)

    @property
    def redistribution_s(self) -> float:
        """One microbatch's redistributions, one way."""
        return sum(chunk.redistribution_s for chunk in self.chunks)


def stages_of(plan: Plan, setting: Setting, *, joined: bool = True) -> tuple[Stage, ...]:
    """Every stage of ``plan`` with its costs; ``joined``: with the seconds of what is done where stacks meet."""
    costs = _Costs(plan, setting)
    entries = [_units(plan, setting, entry) for entry in range(len(plan.layers_per_stage))]
    following: list[UnitName | None] = [*(units[0][0] for units in entries[1:]), None]
    layout, chunks = plan.embedding.sequence_degree, []
    for entry, (units, after) in enumerate(zip(entries, following, strict=True)):
        layers = plan.chunk_layers(entry % plan.pp, entry // plan.pp)
        passed = [(unit, strategy.sequence_degree) for unit, strategy in units]
        moved_s = 0.0
        if joined:
            ends = [at for at in passed if at[0] in ENDS]
            first, last = ends[: entry == 0], ends[entry == 0 :]
            passed, moved_s = [*first, *layouts(plan, setting, layers), *last], sides_s(plan, setting, layers)
        sent_degree = layout if joined else None
        for unit, degree in passed:
            moved_s += redistribution_s(setting, unit, layout, degree)
            layout = degree
        times, memories = zip(*(costs.of(unit, strategy) for unit, strategy in units), strict=True)
        beside = setting.entering_bytes(after) if after is not None else 0
        tables = tables_share(strategy for unit, strategy in units if unit not in ENDS)
        beside += math.ceil(
            shared_bytes(setting) * (tables if entry else tables - 1)
        )  # the embedding counts them whole
        transferred_s = transfer_s(setting, units[0][0], sent_degree) if entry else 0.0
        ahead = on_their_way(plan.pp, plan.model_chunks)
        sent = ahead * setting.entering_bytes(units[0][0]) if entry else 0
        held = in_flight(plan.schedule, plan.pp, entry % plan.pp, plan.num_microbatches, plan.model_chunks)
        seeing = [plan.layers[i] for i in layers if setting.model.spec.kind_of_layers()[i].sees_side]
        degrees, ungathered = ({s.sequence_degree for s in seeing if s.tp <= most} for most in (plan.stage_size, 1))
        kept, passing = side_bytes(setting, layers, degrees, ungathered, plan.embedding.sequence_degree)
        beside, sent = beside + kept, sent + passing
        if joined and (more := joined_times(plan, setting, layers, entry % plan.pp)) is not None:
            times = (*without_tied(times), more)
        of_joints = joined_memories(setting, layers, plan.embedding, plan.layers)
        has_whole = plan.pp > 1 and bool(setting.model.spec.joints) and entry == 0  # of the embedding
        memories = (*of_joints, *memories[has_whole:])
        own = held[entry // plan.pp]
        chunks.append(Chunk(units, times, memories, moved_s, transferred_s, beside, sent, own, layers))
    outside = plan.num_microbatches, plan.model_chunks
    return tuple(
        Stage(
            tuple(chunks[stage :: plan.pp]),
            held_at_once(plan.schedule, plan.pp, stage, *outside) if plan.model_chunks > 1 else (),
        )
        for stage in range(plan.pp)
    )


def _units(plan: Plan, setting: Setting, entry: int) -> Units:
    chunk, stage = divmod(entry, plan.pp)
    kinds = setting.model.spec.kind_of_layers()
    units: list[tuple[UnitName, LayerStrategy]]
    units = [(kinds[i].name, plan.layers[i]) for i in plan.chunk_layers(stage, chunk)]
    if entry == 0:
        units.insert(0, ("embedding", plan.embedding))
    if entry == len(plan.layers_per_stage) - 1:
        units.append(("head", plan.head))
    return tuple(units)


class _Costs:
    """Times and memory of every (unit, strategy) of a plan, each computed once."""

    def __init__(self, plan: Plan, setting: Setting) -> None:
        kinds = [kind.name for kind in setting.model.spec.kind_of_layers()]
        pairs = dict.fromkeys(zip(["embedding", *kinds, "head"], plan.strategies(), strict=True))
        self._found: dict[tuple[UnitName, LayerStrategy], tuple[UnitTimes, UnitMemory]] = {}
        for unit in dict.fromkeys(unit for unit, _ in pairs):
            own = [strategy for name, strategy in pairs if name == unit]
            columns = Strategies.of(own)
            times, memory = all_unit_times(setting, unit, columns), all_unit_memory(setting, unit, columns)
            self._found.update({(unit, s): (times.row(i), memory.row(i)) for i, s in enumerate(own)})

    def of(self, unit: UnitName, strategy: LayerStrategy) -> tuple[UnitTimes, UnitMemory]:
        return self._found[unit, strategy]


def messages_s(stages: tuple[Stage, ...], stage: int) -> Iterator[float]:
    """Seconds of every message that one microbatch brings ``stage``: forward from before, backward from behind."""
    entries = [chunk for row in zip(*(s.chunks for s in stages), strict=True) for chunk in row]
    for entry in range(stage, len(entries), len(stages)):
        if entry > 0:
            yield entries[entry].transfer_s
        if entry < len(entries) - 1:
            yield entries[entry + 1].transfer_s


def replicated_s(plan: Plan, setting: Setting, stage: Stage) -> float:
    """One all-reduce for each tp degree under which ranks hold a trained parameter whole: all bytes, one latency."""
    held = [(strategy.tp, p) for unit, strategy in stage.units for p in setting.parameters(unit)]
    if setting.model.spec.joints:
        held += [(plan.embedding.tp, p) for c in stage.chunks for p in setting.parameters("embedding", c.layers)]
    degrees = {tp for tp, p in held if p.trainable and max(p.copies(tp)) > 1}
    latencies = sum(setting.link("all_reduce", tp, 1).latency_s for tp in degrees)
    return latencies + sum(float(unit.replicated_s) for unit in stage.times)
