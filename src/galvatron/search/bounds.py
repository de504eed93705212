"""Lower bounds on a task's objective, cheap enough to compute for every task.

Takes a costed Space; gives seconds that no plan of it beats.  Two relaxations:

* memory: each stage's limit becomes one limit for all stages together, every stage holds as few microbatches
  as the emptiest one, and transients, redistribution and fitting layouts are free.  What is left is a knapsack;
  its Lagrangian dual max over λ ≥ 0 of Σ min (w + λ·bytes) - λ·total bytes bounds Σ w from below;
* balance: max w is at least the mean of w, and at least ⌈L / pp⌉ of the fastest layers.
"""

from __future__ import annotations

import math

import numpy as np

from .space import Floats, Space

ROUNDING = 1e-12  # relative; keeps float rounding from lifting a bound above the optimum that attains it


def lower_bound_s(space: Space) -> float:
    """Seconds that the objective cannot go below; infinite when the task surely has no plan."""
    if space.is_empty:
        return math.inf
    task, units = space.task, (space.layer, space.embedding, space.head)
    counts = np.array([space.num_layers, 1, 1])
    in_flight = min(task.in_flight(stage) for stage in range(task.pp))
    held = [unit.held_bytes(in_flight).astype(np.float64) for unit in units]
    total = float(task.pp * space.usable_bytes)
    if sum(count * column.min() for count, column in zip(counts, held, strict=True)) > total:
        return math.inf
    prices = np.unique(np.concatenate([np.zeros(1), *(_prices(u.work_s, h) for u, h in zip(units, held, strict=True))]))
    dual = -prices * total
    for count, unit, column in zip(counts, units, held, strict=True):
        dual += count * (unit.work_s + prices[:, None] * column).min(axis=1)
    works = float(dual.max()) + sum(space.receives_s(stage) for stage in range(task.pp))
    fullest = math.ceil(space.num_layers / task.pp) * float(space.layer.work_s.min())
    return float(space.setting.combined_s(works, max(works / task.pp, fullest))) * (1 - ROUNDING)


def _prices(work_s: Floats, held: Floats) -> Floats:
    """Every λ at which two options cost the same: the breakpoints of the dual."""
    seconds, size = work_s[:, None] - work_s, held - held[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = seconds / size
    positive: Floats = ratio[np.isfinite(ratio) & (ratio > 0)]
    return positive


def layer_bounds_s(space: Space) -> Floats:
    """For every layer option: a bound on plans whose layers all use it; infinite where they cannot fit."""
    if space.is_empty:
        return np.full(len(space.layer.strategies), np.inf)
    task, layer = space.task, space.layer
    held = layer.held_bytes(min(task.in_flight(stage) for stage in range(task.pp)))
    ends_s = float(space.embedding.work_s.min() + space.head.work_s.min())
    works = space.num_layers * layer.work_s + ends_s + sum(space.receives_s(stage) for stage in range(task.pp))
    largest = np.maximum(works / task.pp, math.ceil(space.num_layers / task.pp) * layer.work_s)
    bounds = space.setting.combined_s(works, largest) * (1 - ROUNDING)
    return np.where(space.num_layers * held > task.pp * space.usable_bytes, np.inf, bounds)
