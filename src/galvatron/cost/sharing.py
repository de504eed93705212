"""The timeline of a pipeline whose ranks share cores: while some wait, the others run faster.

Takes what ``pipeline.timeline`` takes, measured while all ranks were busy, and which fraction of them could run
at full speed at once; gives events.  Several CPU processes on few cores are like that; devices of their own
are not.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from galvatron.plan.schedules import Action, Kind

from .pipeline import Event, Pipeline


@dataclass(slots=True)
class _Running:
    action: Action
    start_s: float
    left_s: float


def shared_timeline(pipeline: Pipeline, full_speed_fraction: float) -> tuple[Event, ...]:
    """Events of one step, by stage and then by time; receiving a message is work of the receiver.

    With a share a of the stages at work each runs min(1 / a, 1 / ``full_speed_fraction``) times as fast as it
    was measured: the cores are shared equally, and none does more than one rank can use.
    """
    pp = pipeline.pp
    waiting = [deque(pipeline.actions(stage)) for stage in range(pp)]
    running: dict[int, _Running] = {}
    ends: dict[tuple[int, Kind, int], float] = {}
    events: list[list[Event]] = [[] for _ in range(pp)]
    now_s = 0.0
    while running or any(waiting):
        for stage in set(range(pp)) - running.keys():
            if not waiting[stage]:
                continue
            source = pipeline.input_of(stage, waiting[stage][0])
            if source is None or source in ends:
                action = waiting[stage].popleft()
                received_s = 0.0 if source is None else pipeline.message_s(stage, action)
                if pipeline.ready_s and not events[stage]:
                    received_s += pipeline.ready_s[stage]
                running[stage] = _Running(action, now_s, pipeline.duration_s(stage, action) + received_s)
        assert running, f"schedule {pipeline.schedule} deadlocks with pp={pp}"
        least_s = min(run.left_s for run in running.values())
        now_s += least_s / min(pp / len(running), 1 / full_speed_fraction)
        for stage, run in list(running.items()):
            run.left_s -= least_s
            if run.left_s <= 0:
                kind, microbatch, chunk = run.action
                events[stage].append(Event(stage, kind, microbatch, run.start_s, now_s, chunk))
                ends[chunk * pp + stage, kind, microbatch] = now_s
                del running[stage]
    return tuple(event for stage_events in events for event in stage_events)
