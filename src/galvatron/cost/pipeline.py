"""The exact timeline of a pipeline schedule: who computes what from when to when.

Takes seconds per (stage, microbatch) of forward and backward, and of one transfer between neighbours; gives
events.  Knows nothing of plans or layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from galvatron.plan.plan import Schedule
from galvatron.plan.schedules import actions

Kind = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Event:
    """One forward or backward of one microbatch on one stage, in seconds from the step's start."""

    stage: int
    kind: Kind
    microbatch: int
    start_s: float
    end_s: float


def timeline(
    schedule: Schedule,
    forward_s: Sequence[Sequence[float]],
    backward_s: Sequence[Sequence[float]],
    transfer_s: float = 0.0,
    *,
    receiving_blocks: bool = False,
) -> tuple[Event, ...]:
    """Events of one step, by stage and then by time, each as early as its stage and its input allow.

    ``forward_s[stage][microbatch]`` and ``backward_s`` alike.  What a neighbour sends arrives ``transfer_s`` after
    it was computed; with ``receiving_blocks`` the receiver is busy for that time and computes nothing.
    """
    pp, m = len(forward_s), len(forward_s[0])
    orders = [actions(schedule, pp, stage, m) for stage in range(pp)]
    next_action, free_at = [0] * pp, [0.0] * pp
    ends: dict[tuple[int, Kind, int], float] = {}
    events: list[list[Event]] = [[] for _ in range(pp)]
    waiting = pp * 2 * m
    while waiting:
        before = waiting
        for stage in range(pp):
            while next_action[stage] < len(orders[stage]):
                kind, i = orders[stage][next_action[stage]]
                arrived = arrival(ends, stage, kind, i, pp)
                if arrived is None:
                    break
                start = free_at[stage]
                if arrived != NO_INPUT:
                    start = max(start, arrived) + transfer_s if receiving_blocks else max(start, arrived + transfer_s)
                end = start + (forward_s if kind == "forward" else backward_s)[stage][i]
                events[stage].append(Event(stage, kind, i, start, end))
                ends[stage, kind, i] = free_at[stage] = end
                next_action[stage] += 1
                waiting -= 1
        assert waiting < before, f"schedule {schedule} deadlocks with pp={pp}, num_microbatches={m}"
    return tuple(event for stage_events in events for event in stage_events)


NO_INPUT = -1.0


def arrival(ends: dict[tuple[int, Kind, int], float], stage: int, kind: Kind, i: int, pp: int) -> float | None:
    """When the neighbour finished the input of an action; None if not yet, NO_INPUT if it needs none."""
    source = stage - 1 if kind == "forward" else stage + 1
    return ends.get((source, kind, i)) if 0 <= source < pp else NO_INPUT
