"""Dividing layers among stages: exact for a step that grows with Σ w and max w, boundary layouts included.

Takes one table a stage (the least work for every segment of layers, entry layout and last layout); gives the best
contiguous division.  Knows nothing of strategies or bytes, which the tables have settled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from galvatron.cost.setting import Setting
from galvatron.cost.strategies import Floats, Ints

Tables = dict[int, Floats]
"""One stage: for every number of layers k it may hold, work[row, entry layout, last layout], infinite where
impossible.  One row serves all where segments may begin anywhere; else row i is that of segments from layer i."""

Segment = tuple[int, int, int, int]
"""One stage's share: first layer, number of layers, entry layout, last layout."""


@dataclass(frozen=True)
class Division:
    """The best division and its value; Σ and max of its stages' work."""

    value: float
    total_s: float
    largest_s: float
    segments: tuple[Segment, ...]


def divide(tables: list[Tables], num_layers: int, setting: Setting) -> Division | None:
    """Minimise ``setting.combined_s(Σ w, max w)``; None when no division is possible.

    For every limit on max w the least Σ w is a shortest path.  Lowering the limit below the last path's own largest
    stage walks along all trade-offs between the two, from the least Σ to the least max; it stops where even the least
    possible max could not pay for Σ.
    """
    tables = _by_ends_where_single(tables, num_layers)
    fastest = _path(tables, num_layers, np.add, np.inf)
    if fastest is None:
        return None
    flattest = _path(tables, num_layers, np.maximum, np.inf)
    assert flattest is not None
    least_largest = flattest.largest_s
    best = min(_valued(fastest, setting), _valued(flattest, setting), key=lambda d: d.value)
    current: Division | None = fastest
    limit = _useful_limit(setting, best.value, fastest.total_s)
    if limit < fastest.largest_s:
        current = _path(tables, num_layers, np.add, limit)
    while current is not None:
        best = min(best, _valued(current, setting), key=lambda d: d.value)
        if float(setting.combined_s(current.total_s, least_largest)) >= best.value:
            break
        below = np.nextafter(current.largest_s, 0)
        current = _path(tables, num_layers, np.add, float(below)) if below >= least_largest else None
    return best


def largest_only(tables: list[Tables], num_layers: int) -> Division | None:
    """The division whose largest stage is least; its value is that stage's."""
    return _path(tables, num_layers, np.maximum, np.inf)


def _valued(division: Division, setting: Setting) -> Division:
    value = float(setting.combined_s(division.total_s, division.largest_s))
    return Division(value, division.total_s, division.largest_s, division.segments)


def _useful_limit(setting: Setting, best_value: float, least_total: float) -> float:
    """The largest stage beyond which no Σ, however small, beats ``best_value``; with a little for rounding."""
    m, fill = setting.num_microbatches, setting.fill
    rest = best_value / setting.hardware.device.full_speed_fraction - fill * least_total
    return float(rest / (m - fill) * (1 + 1e-9)) if m - fill > 1e-9 else np.inf


def least_total_and_largest(tables: list[Tables], num_layers: int) -> tuple[float, float] | None:
    """The least Σ and, on its own, the least max of any division; None when there is none."""
    tables = _by_ends_where_single(tables, num_layers)
    fastest, flattest = (_path(tables, num_layers, join, np.inf) for join in (np.add, np.maximum))
    return None if fastest is None or flattest is None else (fastest.total_s, flattest.largest_s)


Join = Callable[[Floats, Floats], Floats]


def _path(tables: list[Tables], num_layers: int, join: Join, limit: float) -> Division | None:
    """The best path under ``join`` (sum or maximum) whose every stage takes at most ``limit``."""
    size = max(max(work.shape[1:]) for table in tables for work in table.values()) if all(tables) else 0
    if not size:
        return None
    if BY_ENDS in tables[0]:
        return _single_layout_path([table[BY_ENDS][0] for table in tables], num_layers, join, limit)
    value = np.full((num_layers + 1, size), np.inf)
    value[0, 0] = 0.0
    history: list[tuple[Ints, Ints, Floats]] = []
    for table in tables:
        value, length, entry, work = _advance(value, table, num_layers, join, limit)
        history.append((length, entry, work))
    last = int(np.argmin(value[num_layers]))
    if not np.isfinite(value[num_layers, last]):
        return None
    return _trace(history, num_layers, last)


BY_ENDS = -1
"""The key under which a stage without layouts holds its work as one matrix [1, first layer, end]."""


def _by_ends_where_single(tables: list[Tables], num_layers: int) -> list[Tables]:
    """Where layouts make no difference: every stage as a matrix, which a path then takes in one step."""
    if all(BY_ENDS in table for table in tables):
        return tables
    if not all(work.shape[1:] == (1, 1) for table in tables for work in table.values()) or not all(tables):
        return tables
    return [{BY_ENDS: by_ends(_rows(table, num_layers), num_layers)[None]} for table in tables]


def _rows(table: Tables, num_layers: int) -> Floats:
    """work[row, k] of a stage without layouts."""
    rows = np.full((max(map(len, table.values())), num_layers + 1), np.inf)
    for k, work in table.items():
        rows[:, k] = work[:, 0, 0]
    return rows


def _single_layout_path(matrices: list[Floats], num_layers: int, join: Join, limit: float) -> Division | None:
    """The same where a stage is a matrix over (first layer, end)."""
    value = np.full(num_layers + 1, np.inf)
    value[0] = 0.0
    values, works = [value], [work if limit == np.inf else np.where(work <= limit, work, np.inf) for work in matrices]
    for work in works:
        values.append(join(values[-1][:, None], work).min(axis=0))
    if not np.isfinite(values[-1][num_layers]):
        return None
    end, segments, taken = num_layers, [], []
    for before, work in zip(reversed(values[:-1]), reversed(works), strict=True):
        first = int(join(before, work[:, end]).argmin())
        segments.append((first, end - first, 0, 0))
        taken.append(float(work[first, end]))
        end = first
    total = float(sum(reversed(taken)))
    return Division(max(taken), total, max(taken), tuple(reversed(segments)))


def by_ends(work: Floats, num_layers: int) -> Floats:
    """work[first layer, end] from work[row, k]; infinite where a segment would end before it begins."""
    matrix: Floats = np.append(work, np.inf)[places(len(work), num_layers)]
    return matrix


@lru_cache(maxsize=64)
def places(rows: int, num_layers: int) -> Ints:
    """Where each (first layer, end) is among [row, k] and one more, for those that would end before they begin."""
    start, end = np.ogrid[: num_layers + 1, : num_layers + 1]
    row = np.zeros_like(start) if rows == 1 else np.minimum(start, rows - 1)
    found: Ints = np.where(
        (end >= start) & ((rows == 1) | (start == row)), row * (num_layers + 1) + end - start, rows * (num_layers + 1)
    )
    return found


def _advance(
    value: Floats, table: Tables, num_layers: int, join: Join, limit: float
) -> tuple[Floats, Ints, Ints, Floats]:
    """One more stage: the best value by (layers so far, last layout), its length, entry layout and own work."""
    shape = value.shape
    best, own = np.full(shape, np.inf), np.zeros(shape)
    length, entry = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for k, work in table.items():
        starts = num_layers + 1 - k
        rows = work if work.shape[0] == 1 else work[:starts]
        starts = min(starts, len(rows)) if work.shape[0] > 1 else starts
        allowed = np.where(rows <= limit, rows, np.inf)
        entries, exits = work.shape[1:]
        through = join(value[:starts, :entries, None], allowed)
        chosen = through.argmin(axis=1)
        reached = np.take_along_axis(through, chosen[:, None, :], axis=1)[:, 0]
        at = (slice(k, k + starts), slice(0, exits))
        better = reached < best[at]
        best[at] = np.where(better, reached, best[at])
        length[at] = np.where(better, k, length[at])
        entry[at] = np.where(better, chosen, entry[at])
        taken = np.take_along_axis(np.broadcast_to(rows, through.shape), chosen[:, None, :], axis=1)[:, 0]
        own[at] = np.where(better, taken, own[at])
    return best, length, entry, own


def _trace(history: list[tuple[Ints, Ints, Floats]], layers: int, layout: int) -> Division:
    segments: list[Segment] = []
    works = []
    for length, entry, work in reversed(history):
        k, before = int(length[layers, layout]), int(entry[layers, layout])
        works.append(float(work[layers, layout]))
        segments.append((layers - k, k, before, layout))
        layers, layout = layers - k, before
    total = float(sum(reversed(works)))
    return Division(max(works), total, max(works), tuple(reversed(segments)))
