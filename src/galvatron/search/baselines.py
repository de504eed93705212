"""The simple plans that a searched one is held against: one strategy for all layers.

Takes a Space; gives the members of a family in it with their bounds.  Knows nothing of which space is best.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from galvatron.core.model import ENDS, UnitName
from galvatron.cost.strategies import Floats, Ints, Strategies
from galvatron.plan.schedules import in_flight

from .bounds import ROUNDING
from .builder import Rows
from .space import Space
from .stages import places
from .tasks import Task

BLOCK = 64  # members that are looked at together

Members = Callable[[Strategies, int], NDArray[np.bool_]]
"""Which rows belong to a family, given how many devices a node has."""


@dataclass(frozen=True)
class Family:
    """``tasks``: which outsides belong to it; ``members``: which layer strategies; ``ends_alike``: embedding and head
    are cut as layers are."""

    words: str
    tasks: Callable[[Task], bool]
    members: Members
    ends_alike: bool


def _plain(s: Strategies) -> NDArray[np.bool_]:
    plain: NDArray[np.bool_] = (s.ulysses == 1) & (s.cp == 1) & (s.ep == 1) & (s.offload == 0)
    return plain


def _filled(s: Strategies, degree: Ints) -> NDArray[np.bool_]:
    filled: NDArray[np.bool_] = _plain(s) & (degree == s.sequence_degree * s.dp)
    return filled


FAMILIES: dict[str, Family] = {
    "dp": Family("data parallel alone", lambda t: t.pp == 1, lambda s, _: _filled(s, s.dp_replicate), True),
    "fsdp": Family(
        "fully sharded data parallel (ZeRO 3) alone",
        lambda t: t.pp == 1,
        lambda s, _: _filled(s, s.dp_shard) & ((s.zero == 3) | (s.dp_shard == 1)),
        True,
    ),
    "tp": Family("tensor parallel alone", lambda t: t.pp == 1, lambda s, _: _filled(s, s.tp), True),
    "pp": Family("pipeline alone", lambda t: t.schedule == "1f1b", lambda s, _: _plain(s) & (s.tp * s.dp == 1), True),
    "3d": Family(
        "tensor, pipeline and data parallelism, one strategy (3D)",
        lambda t: t.schedule in ("1f1b", "interleaved"),
        lambda s, node: _plain(s) & (s.zero <= 1) & (s.tp <= node),
        False,
    ),
    "uniform": Family("one strategy for all layers", lambda t: True, lambda s, _: np.ones(len(s), dtype=bool), False),
}


@dataclass(frozen=True)
class Member:
    """One strategy for all layers: for every unit the options that it may use, with a lower bound."""

    bound_s: float
    chosen: Mapping[UnitName, Ints]


def rows_of(name: str, devices_per_node: int, every: Rows) -> Rows:
    """Of ``every`` strategy those of the family's members."""
    family = FAMILIES[name]

    def rows(stage_size: int, unit: UnitName) -> Strategies:
        found = every(stage_size, unit)
        whole = unit in ENDS and not family.ends_alike
        return found if whole else found.take(family.members(found, devices_per_node))

    return rows


def members(space: Space, name: str, devices_per_node: int) -> Iterator[Member]:
    """The family's members in ``space``, best bound first; those that surely do not fit are left out."""
    kinds = [kind.name for kind in space.setting.model.spec.layers]
    bounds_s, rows = _ranked(space, name, devices_per_node, _bounds_s)
    for first in range(0, len(bounds_s), BLOCK):
        block = rows[:, first : first + BLOCK]
        for at in np.flatnonzero(_fit(space, kinds, block)).tolist():
            yield from _member(space, name, float(bounds_s[first + at]), rows[:, first + at])


def leanest(space: Space, name: str, devices_per_node: int) -> Member | None:
    """The family's member that holds least, by the layers of one stage; None when the family is empty here."""
    bytes_, rows = _ranked(space, name, devices_per_node, _stage_bytes)
    found = (_member(space, name, float(least), rows[:, at]) for at, least in enumerate(bytes_))
    return next(itertools.chain.from_iterable(found), None)


Measure = Callable[[Space, list[UnitName], Ints], Floats]


def _ranked(space: Space, name: str, devices_per_node: int, measure: Measure) -> tuple[Floats, Ints]:
    """Ascending ``measure`` of strategies of the family, where it is finite, and [kind, strategy]: their options."""
    family, kinds = FAMILIES[name], [kind.name for kind in space.setting.model.spec.layers]
    if space.is_empty or not family.tasks(space.task):
        return np.zeros(0), np.zeros((len(kinds), 0), dtype=np.int64)
    lead = _lead(space)
    rows = _same_rows(space, lead, kinds)
    matched = np.flatnonzero(family.members(space.options[lead].strategies, devices_per_node) & (rows >= 0).all(axis=0))
    measured = measure(space, kinds, rows[:, matched])
    order = np.argsort(measured, kind="stable")[: np.count_nonzero(np.isfinite(measured))]
    return measured[order], rows[:, matched[order]]


def _member(space: Space, name: str, bound_s: float, rows: Ints) -> Iterator[Member]:
    """The member with the options ``rows`` of the kinds, unless ends have to be like layers and cannot."""
    kinds = [kind.name for kind in space.setting.model.spec.layers]
    chosen: dict[UnitName, Ints] = {kind: rows[i : i + 1] for i, kind in enumerate(kinds)}
    lead = _lead(space)
    ends = _ends_like(space, lead, int(chosen[lead][0])) if FAMILIES[name].ends_alike else {}
    if ends is not None:
        yield Member(bound_s, chosen | ends)


def _fit(space: Space, kinds: list[UnitName], rows: Ints) -> NDArray[np.bool_]:
    """Of every member whether some division fits if the ends were what holds least, and nothing passed there."""
    layers, options = space.geometry.num_layers, [space.options[kind] for kind in kinds]
    room = space.usable_bytes - np.min([o.transient_bytes[at] for o, at in zip(options, rows, strict=True)], axis=0)
    reached: NDArray[np.bool_] = np.zeros((rows.shape[1], layers + 1), dtype=bool)
    reached[:, 0] = True
    for shape in space.geometry.stages:
        held = [
            space.options[unit.unit].held_bytes(unit.in_flight)[rows[kinds.index(unit.unit)]]
            if unit.unit in kinds
            else np.full(rows.shape[1], space.options[unit.unit].held_bytes(unit.in_flight).min())
            for unit in shape.classes
        ]
        segments = np.nonzero(shape.allowed)
        needed = shape.counts[segments] @ np.array(held) + shape.beside_bytes[segments][:, None]  # [segment, member]
        fits = np.zeros((rows.shape[1], shape.allowed.size + 1), dtype=bool)
        fits[:, np.flatnonzero(shape.allowed)] = (needed <= room).T
        through = fits[:, places(len(shape.allowed), layers)]  # [member, first layer, end]
        reached = np.any(reached[:, :, None] & through, axis=1)
    return reached[:, layers]


def _lead(space: Space) -> UnitName:
    """The kind whose strategies name the members: one with experts where there is one, so that ep is told apart."""
    layers = space.setting.model.spec.layers
    return max(layers, key=lambda kind: kind.num_experts).name


def _same_rows(space: Space, lead: UnitName, kinds: list[UnitName]) -> Ints:
    """[kind, option of the lead]: the option of every kind with the same strategy (ep 1 without experts), or -1."""
    if len(kinds) == 1:
        return np.arange(len(space.options[lead]), dtype=np.int64)[None]
    of_lead = space.options[lead].strategies
    without = replace(of_lead, ep=np.ones_like(of_lead.ep))
    found = []
    for kind in kinds:
        has_experts = space.setting.model.spec.kind(kind).num_experts > 0
        found.append((of_lead if has_experts else without).found_in(space.options[kind].strategies))
    return np.array(found, dtype=np.int64)


def _ends_like(space: Space, lead: UnitName, option: int) -> dict[UnitName, Ints] | None:
    (row,) = space.options[lead].strategies.take(np.array([option])).rows()
    alike = [space.options[end].index.get((*row[:3], 1, *row[4:7], 0, *row[8:])) for end in ENDS]
    return None if None in alike else {end: np.array([at]) for end, at in zip(ENDS, alike, strict=True)}


def _stage_bytes(space: Space, kinds: list[UnitName], rows: Ints) -> Floats:
    """For every member: bytes of a mean stage's layers on the first stage, its largest transient included."""
    counts = np.array([kind.count for kind in space.setting.model.spec.layers])
    task = space.task
    held = max(in_flight(task.schedule, task.pp, 0, task.num_microbatches, task.model_chunks))
    options = [space.options[kind] for kind in kinds]
    stays = counts @ np.array([o.held_bytes(held)[at] for o, at in zip(options, rows, strict=True)]) / task.pp
    bytes_: Floats = stays + np.max([o.transient_bytes[at] for o, at in zip(options, rows, strict=True)], axis=0)
    return bytes_


def _bounds_s(space: Space, kinds: list[UnitName], rows: Ints) -> Floats:
    """For every member: a bound on its plans; infinite where they cannot fit.

    Σ w is what all units take; max w at least its mean, and the fastest kind's share of a stage.
    """
    task, setting = space.task, space.setting
    counts = np.array([kind.count for kind in setting.model.spec.layers])
    work = np.array([space.options[kind].work_s[at] for kind, at in zip(kinds, rows, strict=True)])
    ends_s = float(sum(space.options[end].work_s.min() for end in ENDS))
    total = counts @ work + ends_s
    share = math.ceil(int(counts.sum()) / task.pp) * work.min(axis=0)
    bounds = setting.combined_s(total, np.maximum(total / task.pp, share)) * (1 - ROUNDING)
    return np.where(_layers_that_fit(space, kinds, rows) < counts.sum(), np.inf, bounds)


def _layers_that_fit(space: Space, kinds: list[UnitName], rows: Ints) -> Ints:
    """For every member: how many layers all stages could hold if they held nothing else and all were the smallest."""
    task, fitting = space.task, np.zeros(rows.shape[1], dtype=np.int64)
    options = [space.options[kind] for kind in kinds]
    for stage in range(task.pp):
        in_flight_here = in_flight(task.schedule, task.pp, stage, task.num_microbatches, task.model_chunks)
        held = [o.held_bytes(min(in_flight_here))[at] for o, at in zip(options, rows, strict=True)]
        room = space.usable_bytes - np.min([o.transient_bytes[at] for o, at in zip(options, rows, strict=True)], axis=0)
        fitting += np.maximum(room, 0) // np.min(held, axis=0)
    return fitting
