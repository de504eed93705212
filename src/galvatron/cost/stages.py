"""A plan's stages with their units' costs: the nouns that ``step`` adds up.

Takes a Plan and its Setting; gives stages of chunks of units.  Knows nothing of timelines or search.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from galvatron.core.model import ENDS, UnitName
from galvatron.plan.plan import LayerStrategy, Plan
from galvatron.plan.schedules import InFlight, in_flight

from .communication import redistribution_s, transfer_s
from .joints import joint_bytes
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
    every chunk but the first makes its own.  ``sent_bytes``: the gradient of the chunk's input, which may still be on
    its way while the next microbatch passes.  ``joint_bytes``: what it holds beyond its units (``cost.joints``).
    """

    units: Units
    times: tuple[UnitTimes, ...]
    memories: tuple[UnitMemory, ...]
    redistribution_s: float
    transfer_s: float
    beside_bytes: int
    sent_bytes: int
    in_flight: InFlight
    joint_bytes: int = 0

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
        return alive + self.joint_bytes + sum(int(unit.held_bytes(self.in_flight)) for unit in self.memories)

    @property
    def sure_bytes(self) -> int:
        """What of that is surely alive at once."""
        sure = InFlight(self.in_flight.alive, self.in_flight.waiting)
        return replace(self, in_flight=sure, joint_bytes=0).activation_bytes


@dataclass(frozen=True)
class Stage:
    """The chunks of one stage."""

    chunks: tuple[Chunk, ...]

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


def stages_of(plan: Plan, setting: Setting) -> tuple[Stage, ...]:
    """Every stage of ``plan`` with its costs."""
    costs = _Costs(plan, setting)
    entries = [_units(plan, setting, entry) for entry in range(len(plan.layers_per_stage))]
    following: list[UnitName | None] = [*(units[0][0] for units in entries[1:]), None]
    layout, chunks = plan.embedding.sequence_degree, []
    for entry, (units, after) in enumerate(zip(entries, following, strict=True)):
        moved_s = 0.0
        for unit, strategy in units:
            moved_s += redistribution_s(setting, unit, layout, strategy.sequence_degree)
            layout = strategy.sequence_degree
        times, memories = zip(*(costs.of(unit, strategy) for unit, strategy in units), strict=True)
        beside = setting.entering_bytes(after) if after is not None else 0
        tables = tables_share(strategy for unit, strategy in units if unit not in ENDS)
        beside += math.ceil(
            shared_bytes(setting) * (tables if entry else tables - 1)
        )  # the embedding counts them whole
        layers = plan.chunk_layers(entry % plan.pp, entry // plan.pp)
        transferred_s = transfer_s(setting, units[0][0]) if entry else 0.0
        sent = setting.entering_bytes(units[0][0]) if entry else 0
        held = in_flight(plan.schedule, plan.pp, entry % plan.pp, plan.num_microbatches, plan.model_chunks)
        own = held[entry // plan.pp]
        joined = joint_bytes(setting, layers, plan.embedding, own.alive)
        chunks.append(Chunk(units, times, memories, moved_s, transferred_s, beside, sent, own, joined))
    return tuple(Stage(tuple(chunks[stage :: plan.pp])) for stage in range(plan.pp))


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


def replicated_s(setting: Setting, stage: Stage) -> float:
    """One all-reduce for each tp degree under which ranks hold a trained parameter whole: all bytes, one latency."""
    degrees = {
        strategy.tp
        for unit, strategy in stage.units
        for p in setting.parameters(unit)
        if strategy.tp > 1 and p.trainable and (p.cut is None or p.cut.is_whole(strategy.tp))
    }
    latencies = sum(setting.link("all_reduce", tp, 1).latency_s for tp in degrees)
    return latencies + sum(float(unit.replicated_s) for unit in stage.times)
