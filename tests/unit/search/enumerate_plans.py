"""Every plan of a small space, from the definitions: the oracle that the search is held against.

It shares with the search only the cost of one unit, one redistribution and one message, the rules of ``plan`` and the
microbatches in flight; how they add up, what fits and what is allowed is written here a second time.  All strategies
of all units are laid out as one array a unit, one axis a unit, so that a division's every plan is one expression.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from galvatron.core.hardware import HardwareProfile
from galvatron.core.model import ENDS
from galvatron.core.model_profile import ModelProfile
from galvatron.cost import Setting, unit_memory, unit_times
from galvatron.cost.communication import redistribution_s, transfer_s
from galvatron.cost.joints import side_bytes
from galvatron.cost.memory import shared_bytes
from galvatron.plan.axes import divisors
from galvatron.plan.hetu import inexpressible_strategy
from galvatron.plan.plan import LayerStrategy
from galvatron.plan.rules import check_strategy
from galvatron.plan.schedules import InFlight, in_flight, on_their_way


@dataclass(frozen=True)
class Choice:
    """What an instance may use: values by dimension, schedules with their chunks."""

    values: dict[str, tuple[Any, ...]]
    schedules: tuple[tuple[str, int], ...]
    runtime: str = "galvatron"


@dataclass(frozen=True)
class Option:
    strategy: LayerStrategy
    work: float
    stays: int
    activation: int
    waiting: int
    transient: int


def every_strategy(size: int, unit: str, choice: Choice) -> Iterator[LayerStrategy]:
    values, end = choice.values, unit in ENDS
    degrees = [d for d in range(1, size + 1) if size % d == 0]
    modes = ("none",) if end else values["recompute"]
    for tp, ulysses, cp, ep, shard in itertools.product(degrees, repeat=5):
        if size % (tp * ulysses * cp * shard) or (end and (cp > 1 or ep > 1)):
            continue
        degree = {"tp": tp, "ulysses": ulysses, "cp": cp, "ep": ep, "dp_shard": shard}
        if any(value not in values[name] for name, value in degree.items()):
            continue
        replicate = size // (tp * ulysses * cp * shard)
        for zero, recompute, offload in itertools.product(values["zero"], modes, values["offload"]):
            shards = ulysses * cp * shard > 1 if zero else shard == 1
            if shards:
                rest = {"dp_replicate": replicate, "zero": zero, "recompute": recompute, "offload": offload}
                yield LayerStrategy.model_validate({**degree, **rest})


class Costs:
    """Every allowed strategy of every unit at one task, with its costs looked up once."""

    def __init__(self, setting: Setting, choice: Choice) -> None:
        self.setting, self.choice = setting, choice
        spec = setting.model.spec
        self.kinds = [kind.name for kind in spec.layers for _ in range(kind.count)]
        self.units = ["embedding", *self.kinds, "head"]
        found = {unit: self._options(unit) for unit in dict.fromkeys(self.units)}
        self.options = [found[unit] for unit in self.units]
        self.count = math.prod(len(options) for options in self.options)
        degrees = sorted({o.strategy.sequence_degree for options in self.options for o in options})
        self.moves = [
            np.array(
                [[2 * setting.whole_fill * redistribution_s(setting, unit, a, b) for b in degrees] for a in degrees]
            )
            for unit in self.units
        ]
        self.layout = [
            self._axis(u, np.array([degrees.index(o.strategy.sequence_degree) for o in options], dtype=np.int64))
            for u, options in enumerate(self.options)
        ]
        columns = ("work", "stays", "activation", "waiting", "transient")
        self.column = {
            name: [self._axis(u, np.array([getattr(o, name) for o in opts])) for u, opts in enumerate(self.options)]
            for name in columns
        }

    def _axis(self, unit: int, values: Any) -> Any:
        return values.reshape([-1 if axis == unit else 1 for axis in range(len(self.units))])

    def _options(self, unit: str) -> list[Option]:
        setting, found = self.setting, []
        for strategy in every_strategy(setting.stage_size, unit, self.choice):
            if strategy.tp not in setting.model.tp_degrees():
                continue
            if setting.runtime == "hetu" and inexpressible_strategy(strategy):
                continue
            shape = (setting.stage_size, setting.micro_batch_size, setting.seq_len)
            if check_strategy(strategy, unit, setting.model.spec, *shape) is None:
                memory = unit_memory(setting, unit, strategy)
                stays = memory.parameter_bytes + memory.gradient_bytes + memory.optimizer_bytes
                stays += memory.unsharded_bytes
                work = float(unit_times(setting, unit, strategy).work_s(setting))
                found.append(
                    Option(
                        strategy,
                        work,
                        int(stays),
                        int(memory.activation_bytes),
                        int(memory.waiting_bytes),
                        int(memory.transient_bytes),
                    )
                )
        return found

    def allowed(self) -> Any:
        """Which combinations the rules allow: ends that are one tensor, or see one sort of inputs, alike.

        Hetu-Galvatron's ends are alike too, and what it does not shard by ZeRO 3 has one ZeRO stage.
        """
        mask = np.ones([len(options) for options in self.options], dtype=bool)
        if self.setting.runtime == "hetu":
            strategies = [[o.strategy for o in options] for options in self.options]
            of_2, of_0 = (
                [np.array([s.zero == zero and s.dp * s.ulysses > 1 for s in own]) for own in strategies]
                for zero in (2, 0)
            )
            some_2, some_0 = (
                functools.reduce(np.logical_or, (self._axis(u, own) for u, own in enumerate(having)))
                for having in (of_2, of_0)
            )
            mask &= ~(some_2 & some_0)
        if self.setting.model.spec.ends_alike or self.setting.runtime == "hetu":
            alike = [[a.strategy == b.strategy for b in self.options[-1]] for a in self.options[0]]
            mask &= np.array(alike).reshape(len(alike), *[1] * len(self.kinds), len(alike[0]))
        return mask


def divisions(kinds: list[str], pp: int, chunks: int) -> Iterator[list[list[int]]]:
    """For every division: the layers of each entry, in forward order (chunk c of stage p is entry c·pp + p)."""
    layers = len(kinds)
    for per_stage in itertools.product(range(chunks, layers + 1), repeat=pp):
        if sum(per_stage) != layers:
            continue
        if chunks > 1 and any(abs(k - layers / pp) > chunks for k in per_stage):
            continue
        if chunks > 1 and len(set(kinds)) > 1:
            base, left = divmod(layers, pp)
            first = (pp - left) // 2
            if list(per_stage) != [base + (first <= p < first + left) for p in range(pp)]:
                continue
        sizes = [per_stage[p] // chunks + (c < per_stage[p] % chunks) for c in range(chunks) for p in range(pp)]
        starts = [0, *itertools.accumulate(sizes)]
        yield [list(range(a, b)) for a, b in itertools.pairwise(starts)]


def kept_bytes(costs: Costs, unit: int, held: InFlight) -> Any:
    """What microbatches in flight keep at worst: some alive, of which some may wait instead, and others waiting."""
    activation, waiting = costs.column["activation"][unit], costs.column["waiting"][unit]
    some = [(held.alive - n) * activation + (held.waiting + n) * waiting for n in range(held.turned + 1)]
    return functools.reduce(np.maximum, some)


def plans_of(setting: Setting, choice: Choice) -> Iterator[tuple[Any, Any]]:
    """For every division of one task: (objectives, tensor bytes of the fullest stage) of all its plans."""
    costs = Costs(setting, choice)
    if not costs.count:
        return
    mask = costs.allowed()
    pp, m, chunks, schedule = setting.pp, setting.num_microbatches, setting.model_chunks, setting.schedule
    fraction, fill = setting.hardware.device.full_speed_fraction, setting.fill
    for entries in divisions(costs.kinds, pp, chunks):
        works, peaks = [], []
        for stage in range(pp):
            held = in_flight(schedule, pp, stage, m, chunks)
            own = [(unit, held[e // pp]) for e in range(stage, len(entries), pp) for unit in units_of(e, entries)]
            work = sum(costs.column["work"][u] + moved(costs, u) for u, _ in own)
            bytes_ = sum(costs.column["stays"][u] + kept_bytes(costs, u, n) for u, n in own)
            transient = costs.column["transient"][own[0][0]]
            for u, _ in own[1:]:
                transient = np.maximum(transient, costs.column["transient"][u])
            for e in range(stage, len(entries), pp):
                first, after = costs.kinds[entries[e][0]], costs.units[entries[e][-1] + 2]
                if e > 0:
                    work = work + setting.received_s(transfer_s(setting, first))
                    gradients = on_their_way(pp, chunks) * setting.entering_bytes(first)
                    bytes_ = bytes_ + held[e // pp].alive * shared_bytes(setting) + gradients
                bytes_ = bytes_ + joined(costs, entries[e], held[e // pp].alive)
                if e < len(entries) - 1:
                    work = work + setting.received_s(transfer_s(setting, after))
                    bytes_ = bytes_ + held[e // pp].alive * setting.entering_bytes(after)
            works.append(work)
            peaks.append(bytes_ + transient)
        total, largest, peak = sum(works), works[0], peaks[0]
        for work, stage_peak in zip(works[1:], peaks[1:], strict=True):
            largest, peak = np.maximum(largest, work), np.maximum(peak, stage_peak)
        objective = np.maximum(fraction * (fill * total + (m - fill) * largest), m * total / pp)
        full = np.broadcast_arrays(objective, peak, mask)
        yield full[0][full[2]], full[1][full[2]]


def joined(costs: Costs, layers: list[int], alive: int) -> Any:
    """What a stage holds of what runs between stacks, by the embedding's option; and of copied tables."""
    setting, spec = costs.setting, costs.setting.model.spec
    if setting.pp == 1 or not spec.joints:
        return 0
    span, (joint,) = range(layers[0], layers[-1] + 1), spec.joints
    found = []
    for option in costs.options[0]:
        resident = passing = 0
        if layers[0] == 0 or joint.layer - 1 in layers:
            whole = unit_memory(setting, "embedding", option.strategy, span)
            resident = int(whole.resident_bytes + whole.transient_bytes)
            passing = int(whole.activation_bytes)
        if layers[0] == 0:
            alone = unit_memory(setting, "embedding", option.strategy)
            resident -= int(alone.resident_bytes + alone.transient_bytes)
            passing -= int(alone.activation_bytes)
        degrees = set(divisors(setting.stage_size))
        kept, sent = side_bytes(setting, span, degrees, degrees, 1)
        found.append(resident + sent + alive * (passing + kept))
    copies = 0
    for start, stop in ((0, joint.layer), (joint.layer, spec.num_layers)):
        within = any(start <= layer < stop for layer in layers)
        if within and (start not in layers or layers[-1] + 1 < stop):  # a copy, or one that others have copies of
            shared = [p for p in spec.kind_of_layers()[start].parameters if p.shared]
            copies += sum(16 * math.prod(p.shape) for p in shared)  # float32: value, gradient, two moments
    return costs._axis(0, np.array(found, dtype=np.int64)) + copies


def units_of(entry: int, entries: list[list[int]]) -> list[int]:
    """Unit indices of an entry: its layers, the embedding before the first and the head after the last."""
    first = [0] if entry == 0 else []
    last = [entries[-1][-1] + 2] if entry == len(entries) - 1 else []
    return [*first, *(layer + 1 for layer in entries[entry]), *last]


def moved(costs: Costs, unit: int) -> Any:
    return 0.0 if unit == 0 else costs.moves[unit][costs.layout[unit - 1], costs.layout[unit]]


def every_task(model: ModelProfile, hardware: HardwareProfile, batch: int, choice: Choice) -> Iterator[Setting]:
    world, layers = hardware.world_size, model.spec.num_layers
    degrees = itertools.product(range(1, min(world, layers) + 1), range(1, batch + 1))
    tasks = [(pp, m, s) for pp, m in degrees for s in (choice.schedules if pp > 1 else (("1f1b", 1),))]
    for pp, m, (schedule, chunks) in tasks:
        if world % pp or batch % m or pp * chunks > layers:
            continue
        if model.spec.stacks > 1 and schedule not in ("gpipe", "1f1b"):
            continue
        if model.spec.task == "contrast" and m > 1:
            continue
        if (chunks > 1 and m % pp) or (m == 1 and schedule in ("interleaved", "zero_bubble")):
            continue
        args = (model, hardware, pp, m, batch, model.seq_len, model.precision, "fp32", schedule, chunks, choice.runtime)
        yield Setting(*args)  # type: ignore[arg-type]


def size_of(model: ModelProfile, hardware: HardwareProfile, batches: tuple[int, ...], choice: Choice) -> int:
    """The most strategies' combinations that one task has."""
    settings = (setting for batch in batches for setting in every_task(model, hardware, batch, choice))
    return max((Costs(setting, choice).count for setting in settings), default=0)
