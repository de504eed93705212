"""The timeline of a pipeline whose ranks share cores: while some wait, the others run faster.

Takes what ``pipeline.timeline`` takes, measured while all ranks were busy, and which fraction of them could run
at full speed at once; gives events.  Several CPU processes on few cores are like that; devices of their own
are not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from galvatron.plan.plan import Schedule
from galvatron.plan.schedules import Action, actions

from .pipeline import NO_INPUT, Event, Kind, arrival

Seconds = Sequence[Sequence[float]]


@dataclass(slots=True)
class _Running:
    action: Action
    start_s: float
    left_s: float


def shared_timeline(
    schedule: Schedule, forward_s: Seconds, backward_s: Seconds, transfer_s: float, full_speed_fraction: float
) -> tuple[Event, ...]:
    """Events of one step, by stage and then by time; receiving a message is work of the receiver.

    With a share a of the stages at work each runs min(1 / a, 1 / ``full_speed_fraction``) times as fast as it
    was measured: the cores are shared equally, and none does more than one rank can use.
    """
    pp, m = len(forward_s), len(forward_s[0])
    waiting = [deque(actions(schedule, pp, stage, m)) for stage in range(pp)]
    running: dict[int, _Running] = {}
    ends: dict[tuple[int, Kind, int], float] = {}
    events: list[list[Event]] = [[] for _ in range(pp)]
    now_s = 0.0
    while running or any(waiting):
        for stage in set(range(pp)) - running.keys():
            ready = arrival(ends, stage, *waiting[stage][0], pp) if waiting[stage] else None
            if ready is not None:
                action = waiting[stage].popleft()
                work_s = (forward_s if action.kind == "forward" else backward_s)[stage][action.microbatch]
                received_s = 0.0 if ready == NO_INPUT else transfer_s
                running[stage] = _Running(action, now_s, work_s + received_s)
        assert running, f"schedule {schedule} deadlocks with pp={pp}, num_microbatches={m}"
        least_s = min(run.left_s for run in running.values())
        now_s += least_s / min(pp / len(running), 1 / full_speed_fraction)
        for stage, run in list(running.items()):
            run.left_s -= least_s
            if run.left_s <= 0:
                events[stage].append(Event(stage, run.action.kind, run.action.microbatch, run.start_s, now_s))
                ends[stage, run.action.kind, run.action.microbatch] = now_s
                del running[stage]
    return tuple(event for stage_events in events for event in stage_events)
