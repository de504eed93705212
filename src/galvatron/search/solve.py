"""One task solved exactly: stage tables from chains of layers, then the division among stages.

Takes a costed Space; gives the best assignment, either the fastest that fits or the one of least peak memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from galvatron.plan.plan import LayerStrategy, Plan

from .layers import Chains, Front, grow, pareto
from .space import Floats, Ints, Space
from .stages import divide

Aim = Literal["time", "memory"]
UNLIMITED = 2**62


@dataclass(frozen=True)
class Solution:
    """``value``: the additive objective in seconds, or the fullest stage's tensor bytes when memory was the aim."""

    value: float
    layers_per_stage: tuple[int, ...]
    embedding: LayerStrategy
    layers: tuple[LayerStrategy, ...]
    head: LayerStrategy

    def plan(self, space: Space) -> Plan:
        """The solution as a plan."""
        setting, task = space.setting, space.task
        return Plan(
            model=setting.model.spec.name,
            world_size=setting.hardware.world_size,
            layers_per_stage=self.layers_per_stage,
            schedule=task.schedule,
            num_microbatches=task.num_microbatches,
            global_batch_size=setting.global_batch_size,
            seq_len=setting.seq_len,
            precision=setting.precision,
            grad_reduce_dtype=setting.grad_reduce_dtype,
            embedding=self.embedding,
            layers=self.layers,
            head=self.head,
        )


def solve(space: Space, aim: Aim = "time") -> Solution | None:
    """The best plan of ``space`` for ``aim``; None when none fits.  Exact.

    Least memory ignores the limit and times: it minimises the largest of the stages' peaks.
    """
    if space.is_empty:
        return None
    if aim == "memory":
        space = _memory_only(space)
    longest = space.num_layers - space.task.pp + 1
    lengths = range(longest if space.task.pp == 1 else 1, longest + 1)
    floors = [_floor(space, stage, longest) if aim == "time" else 0 for stage in range(space.task.pp)]
    keys = [(space.task.in_flight(stage), floor) for stage, floor in enumerate(floors)]
    grown = {key: grow(space.layer, key[0], space.moves_s, space.usable_bytes, lengths, key[1]) for key in set(keys)}
    chains = [grown[key] for key in keys]
    groups = _end_groups(space)
    middle = {stage: _table(space, stage, chains, [(-1, -1)], aim) for stage in range(1, space.task.pp - 1)}
    solutions = (_solve_group(space, chains, middle, group, aim) for group in groups)
    return min((s for s in solutions if s is not None), key=lambda s: s.value, default=None)


def _floor(space: Space, stage: int, longest: int) -> int:
    """A layer's transient below which ``stage`` fits or not regardless: its ends' own, or what surely is left.

    Surely left is what remains when every layer and both ends hold the most that any option does.
    """
    in_flight, last = space.task.in_flight(stage), space.task.pp - 1
    ends = [unit for unit, at in ((space.embedding, 0), (space.head, last)) if at == stage]
    most = longest * int(space.layer.held_bytes(in_flight).max()) + space.stage_bytes(stage)
    most += sum(int(unit.held_bytes(in_flight).max()) for unit in ends)
    return max([space.usable_bytes - most, *(int(unit.transient_bytes.min()) for unit in ends)])


def _memory_only(space: Space) -> Space:
    layer, embedding, head = (
        replace(o, work_s=np.zeros_like(o.work_s)) for o in (space.layer, space.embedding, space.head)
    )
    return replace(
        space,
        layer=layer,
        embedding=embedding,
        head=head,
        moves_s=np.zeros_like(space.moves_s),
        usable_bytes=UNLIMITED,
    )


Ends = list[tuple[int, int]]
"""(embedding option, head option) pairs to choose from; -1 where the stage has no such end."""


def _end_groups(space: Space) -> list[Ends]:
    """Pairs that may be chosen together in one run: all, or one at a time where two stages must agree."""
    if space.end_pairs is None:
        return [[(i, j) for i in range(len(space.embedding.strategies)) for j in range(len(space.head.strategies))]]
    return [list(space.end_pairs)] if space.task.pp == 1 else [[pair] for pair in space.end_pairs]


@dataclass(frozen=True)
class _Table:
    """``work[k - 1, entry, last]`` with the label and the pair of ends that reach it."""

    work: Floats
    label: Ints
    pair: list[tuple[int, int]]
    chosen: Ints


def _solve_group(
    space: Space, chains: list[Chains], middle: dict[int, _Table], pairs: Ends, aim: Aim
) -> Solution | None:
    pp = space.task.pp
    if pp == 1:
        tables = [_table(space, 0, chains, pairs, aim)]
    else:
        first = _table(space, 0, chains, sorted({(i, -1) for i, _ in pairs}), aim)
        last = _table(space, pp - 1, chains, sorted({(-1, j) for _, j in pairs}), aim)
        tables = [first, *(middle[stage] for stage in range(1, pp - 1)), last]
    # the first stage's entry is its embedding's layout: the table's own choice, so take the best of them
    entries = tables[0].work.argmin(axis=1)
    first_work = np.take_along_axis(tables[0].work, entries[:, None, :], axis=1)
    value = space.setting.combined_s if aim == "time" else _largest
    division = divide([first_work, *(table.work for table in tables[1:])], space.num_layers, value)
    if division is None:
        return None
    embedding = head = -1
    layers: list[LayerStrategy] = []
    for stage, (k, entry, last_layout) in enumerate(division.segments):
        table, chain = tables[stage], chains[stage]
        if stage == 0:
            entry = int(entries[k - 1, last_layout])
        at = (k - 1, entry, last_layout)
        ends = table.pair[int(table.chosen[at])]
        embedding, head = max(embedding, ends[0]), max(head, ends[1])
        layers += [chain.options.strategies[i] for i in chain.strategies(k, entry, last_layout, int(table.label[at]))]
    return Solution(
        division.value,
        tuple(k for k, _, _ in division.segments),
        space.embedding.strategies[embedding],
        tuple(layers),
        space.head.strategies[head],
    )


def _largest(total: Floats, largest: Floats) -> Floats:
    return largest


@dataclass(frozen=True)
class _EndCosts:
    """The undominated ends of one stage, with what it holds beside units; layouts are -1 where there is no such end."""

    pairs: list[tuple[int, int]]
    work_s: Floats
    held: Ints
    transient: Ints
    entry: Ints
    exit: Ints


def _end_costs(space: Space, stage: int, pairs: Iterable[tuple[int, int]]) -> _EndCosts:
    in_flight, beside = space.task.in_flight(stage), space.stage_bytes(stage)
    rows = []
    for i, j in pairs:
        parts = [(options, at) for options, at in ((space.embedding, i), (space.head, j)) if at >= 0]
        rows.append(
            (
                sum(float(options.work_s[at]) for options, at in parts),
                beside + sum(int(options.held_bytes(in_flight)[at]) for options, at in parts),
                max((int(options.transient_bytes[at]) for options, at in parts), default=0),
                int(space.embedding.layout[i]) if i >= 0 else -1,
                int(space.head.layout[j]) if j >= 0 else -1,
            )
        )
    work = np.array([row[0] for row in rows], dtype=np.float64)
    held, transient, entry, leave = (np.array([row[c] for row in rows], dtype=np.int64) for c in range(1, 5))
    kept: list[int] = []
    for key in sorted({row[3:] for row in rows}):
        members = np.array([n for n, row in enumerate(rows) if row[3:] == key], dtype=np.int64)
        kept += members[pareto(work[members], held[members], transient[members])].tolist()
    listed = list(pairs)
    return _EndCosts([listed[n] for n in kept], work[kept], held[kept], transient[kept], entry[kept], leave[kept])


def _table(space: Space, stage: int, chains: list[Chains], pairs: Ends, aim: Aim) -> _Table:
    """For every k, entry and last layout: the least work (or peak) of ``stage``, over labels and ends."""
    chain, ends = chains[stage], _end_costs(space, stage, pairs)
    size = len(space.layouts)
    shape = (len(chain.fronts), size, size)
    work, label, chosen = np.full(shape, np.inf), np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for k, by_entry in enumerate(chain.fronts):
        for a in range(size):
            fitting = np.flatnonzero((ends.entry == a) | (ends.entry == -1))
            for b in range(size):
                front = by_entry[a][b]
                if len(front.time_s) and len(fitting):
                    leave_s = np.where(ends.exit >= 0, space.moves_s[b, ends.exit], 0.0)
                    best = _join(front, chain.transients, ends, fitting, leave_s, space, aim)
                    work[k, a, b], label[k, a, b], chosen[k, a, b] = best
    if aim == "time":
        work += space.receives_s(stage)
    return _Table(work, label, ends.pairs, chosen)


def _join(
    front: Front, transients: Ints, ends: _EndCosts, fitting: Ints, leave_s: Floats, space: Space, aim: Aim
) -> tuple[float, int, int]:
    """The best (value, label, ends) of a front with the ends that fit its entry layout."""
    transient = np.maximum(transients[front.rank][:, None], ends.transient[fitting])
    peak = front.held_bytes[:, None] + ends.held[fitting] + transient
    time = front.time_s[:, None] + (ends.work_s + leave_s)[fitting]
    value = np.where(peak <= space.usable_bytes, time, np.inf) if aim == "time" else peak.astype(np.float64)
    at = int(np.argmin(value))
    row, column = divmod(at, len(fitting))
    return float(value[row, column]), row, int(fitting[column])
