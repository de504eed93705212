"""Every strategy that rules, limits and profile allow a unit in a stage, whatever the batch.

Takes a job's Setting, Limits, a stage's size and a unit; gives Strategies.  Knows nothing of costs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cache

import numpy as np

from galvatron.core.model import ENDS, OFFLOADS, RECOMPUTES, UnitName
from galvatron.cost.setting import Setting
from galvatron.cost.strategies import NONE, Ints, Strategies
from galvatron.plan.axes import StageAxes
from galvatron.plan.hetu import inexpressible_strategy
from galvatron.plan.plan import LayerStrategy
from galvatron.plan.rules import check_cuts

from .limits import Limits

NO_ROWS = np.zeros((0, len(fields(Strategies))), dtype=np.int64)


def allowed_rows(job: Setting, limits: Limits, stage_size: int, unit: UnitName) -> Strategies:
    """All of them, by what cuts the unit, then by how its parameters are kept, then by recompute and offload.

    Degrees stack from the inside out, so that each is the ratio of two of the stage's stacked degrees.

    Raises:
        ProfileError: moments shall be offloaded, and nobody measured copies.
    """
    offloads, kept = _offloads(job, limits, unit), cache(lambda *cut: _kept(limits, unit, stage_size, *cut))
    blocks: list[Ints] = []
    for tp in StageAxes(stage_size).degrees:
        levels = [RECOMPUTES.index(level) for level in _recomputes(job, limits, unit, tp)]
        if levels and limits.allows("tp", tp, unit):
            passes = list(itertools.product(levels, offloads))
            for ulysses, cp, ep in _sequence_degrees(job, limits, stage_size, unit, tp):
                blocks.append(_product((tp, ulysses, cp, ep), kept(tp * ulysses * cp, ulysses * cp > 1), passes))
    strategies = Strategies.of_table(np.concatenate([NO_ROWS, *blocks]))
    if job.runtime == "hetu":
        said = [i for i in range(len(strategies)) if inexpressible_strategy(strategies[i]) is None]
        strategies = strategies.take(np.array(said, dtype=np.int64))
    return strategies


def fastest_of(rows: Strategies) -> Strategies:
    """Without those that take no less than another, whatever the batch: to recompute and to copy moments takes time."""
    whole = np.zeros(int(rows.tp.max(initial=0)) + 1, dtype=bool)
    whole[rows.tp[rows.recompute == NONE]] = True
    copied = (rows.offload > 0) & (rows.offload == 0).any()
    return rows.take(~copied & ((rows.recompute == NONE) | ~whole[rows.tp]))


def _product(cut: tuple[int, ...], kept: Sequence[tuple[int, ...]], passes: Sequence[tuple[int, ...]]) -> Ints:
    """Every row of ``kept`` with every one of ``passes``, after ``cut``."""
    rows = len(kept) * len(passes)
    left = np.broadcast_to(np.array(cut, dtype=np.int64), (rows, len(cut)))
    middle = np.repeat(np.array(kept, dtype=np.int64).reshape(len(kept), 3), len(passes), axis=0)
    return np.hstack([left, middle, np.tile(np.array(passes, dtype=np.int64), (len(kept), 1))])


def _kept(limits: Limits, unit: UnitName, stage_size: int, inner: int, in_sequence: bool) -> list[tuple[int, int, int]]:
    """(dp_shard, dp_replicate, zero) beside ``inner`` ranks that share a sequence, ``in_sequence``: tp apart."""
    found = []
    for outer in StageAxes(stage_size).degrees:
        if outer % inner == 0:
            shard, replicate = outer // inner, stage_size // outer
            if limits.allows("dp_shard", shard, unit) and limits.allows("dp_replicate", replicate, unit):
                zeros = _zeros(in_sequence, shard)
                found += [(shard, replicate, zero) for zero in zeros if limits.allows("zero", zero, unit)]
    return found


def _zeros(in_sequence: bool, shard: int) -> tuple[int, ...]:
    """ZeRO stages that mean something: none without ranks to shard over, all but 0 with a dp_shard."""
    return (1, 2, 3) if shard > 1 else (0, 1, 2, 3) if in_sequence else (0,)


def _offloads(job: Setting, limits: Limits, unit: UnitName) -> list[int]:
    """Indices of ``OFFLOADS``; of moments alone where there are any."""
    if not any(p.trainable for p in job.model.spec.unit(unit).parameters):
        return [0]
    known = OFFLOADS if job.hardware.device.host_bytes_per_s is not None else OFFLOADS[:1]
    allowed = [OFFLOADS.index(o) for o in known if limits.allows("offload", o, unit)]
    return allowed or [OFFLOADS.index("optimizer")]


def _recomputes(job: Setting, limits: Limits, unit: UnitName, tp: int) -> list[str]:
    """The levels whose activations the profile has, where it has compute times."""
    if not any(sample.unit == unit and sample.tp == tp for sample in job.model.compute):
        return []
    levels = RECOMPUTES[:1] if unit in ENDS else RECOMPUTES
    known = [level for level in levels if job.has_activations(unit, tp, level)]
    return [level for level in known if limits.allows("recompute", level, unit)]


def _sequence_degrees(
    job: Setting, limits: Limits, stage_size: int, unit: UnitName, tp: int
) -> Iterator[tuple[int, int, int]]:
    """(ulysses, cp, ep) beside ``tp`` that divide tokens, heads, experts and parameters."""
    spec, end, degrees = job.model.spec, unit in ENDS, StageAxes(stage_size).degrees
    experts = 0 if end else spec.kind(unit).num_experts
    factors = [degree // tp for degree in degrees if degree % tp == 0]
    dealt = [e for e in factors if e == 1 or (experts and experts % e == 0)]
    dealt = [ep for ep in dealt if limits.allows("ep", ep, unit)]

    def fits(ulysses: int, cp: int, ep: int) -> bool:
        replicas = stage_size // (tp * ulysses * cp)
        strategy = LayerStrategy(tp=tp, ulysses=ulysses, cp=cp, ep=ep, dp_replicate=replicas)
        return check_cuts(strategy, unit, spec, stage_size, job.seq_len) is None

    dealt = [ep for ep in dealt if fits(1, 1, ep)]  # what deals experts out cuts nothing else
    for ulysses in (u for u in factors if limits.allows("ulysses", u, unit)):
        for cp in (f // ulysses for f in factors if f % ulysses == 0):
            if not (end and cp > 1) and limits.allows("cp", cp, unit) and fits(ulysses, cp, 1):
                yield from ((ulysses, cp, ep) for ep in dealt)
