"""The exact timeline of a pipeline schedule: who computes what from when to when.

Takes a Pipeline: seconds of every pass and message; gives events.  Knows nothing of plans or layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from galvatron.plan.plan import Schedule
from galvatron.plan.schedules import Action, Kind, actions


class Event(NamedTuple):
    """One pass of one microbatch through one chunk of a stage, in seconds from the step's start."""

    stage: int
    kind: Kind
    microbatch: int
    start_s: float
    end_s: float
    chunk: int = 0


@dataclass(frozen=True)
class Pipeline:
    """A schedule with its seconds.

    Chunk c of stage p is entry c x pp + p of every sequence, in the order of the forward pass: seconds of a
    microbatch's forward, backward and (zero bubble alone) weight pass; what the last one's gradients take besides,
    before their message; and of the message into an entry, which goes back as long.  ``ready_s``: when every stage may
    begin.
    """

    schedule: Schedule
    pp: int
    num_microbatches: int
    forward_s: Sequence[float]
    backward_s: Sequence[float]
    weight_s: Sequence[float] = ()
    ready_s: Sequence[float] = ()
    last_s: Sequence[float] = ()
    transfer_s: Sequence[float] = ()

    @property
    def model_chunks(self) -> int:
        """Chunks a stage."""
        return len(self.forward_s) // self.pp

    def actions(self, stage: int) -> list[Action]:
        """The passes of one stage in order."""
        return actions(self.schedule, self.pp, stage, self.num_microbatches, self.model_chunks)

    def duration_s(self, stage: int, action: Action) -> float:
        """How long one pass computes."""
        entry, i = action.chunk * self.pp + stage, action.microbatch
        if action.kind == "forward":
            return self.forward_s[entry]
        last = self.last_s and i == self.num_microbatches - 1 and (action.kind == "weight" or not self.weight_s)
        seconds = self.backward_s if action.kind == "backward" else self.weight_s
        return seconds[entry] + (self.last_s[entry] if last else 0.0)

    def input_of(self, stage: int, action: Action) -> tuple[int, Kind, int] | None:
        """(entry, kind, microbatch) of the pass whose result an action needs first; None if it needs no message."""
        entry = action.chunk * self.pp + stage
        source = entry - 1 if action.kind == "forward" else entry + 1
        if action.kind == "weight" or not 0 <= source < len(self.forward_s):
            return None
        return source, action.kind, action.microbatch

    def message_s(self, stage: int, action: Action) -> float:
        """How long the message travels that an action needs."""
        entry = action.chunk * self.pp + stage
        return self.transfer_s[entry if action.kind == "forward" else entry + 1] if self.transfer_s else 0.0


_Ends = dict[int, float]
"""By microbatch when a pass ends."""


def timeline(pipeline: Pipeline, *, receiving_blocks: bool = False) -> tuple[Event, ...]:
    """Events of one step, by stage and then by time, each as early as its stage and its input allow.

    What a neighbour sends arrives when the message has travelled; with ``receiving_blocks`` the receiver is busy for
    that time and computes nothing.
    """
    pp = pipeline.pp
    orders = [pipeline.actions(stage) for stage in range(pp)]
    next_action, free_at = [0] * pp, list(pipeline.ready_s or [0.0] * pp)
    ends: dict[tuple[int, Kind], _Ends] = {}
    passes = [_passes(pipeline, stage, orders[stage], ends) for stage in range(pp)]
    events: list[list[Event]] = [[] for _ in range(pp)]
    waiting = sum(map(len, orders))
    while waiting:
        before = waiting
        for stage in range(pp):
            while next_action[stage] < len(orders[stage]):
                action = orders[stage][next_action[stage]]
                kind, microbatch, chunk = action
                sent, own, travel, seconds = passes[stage][kind, chunk]
                start = free_at[stage]
                if sent is not None:
                    if microbatch not in sent:
                        break
                    arrived = sent[microbatch]
                    start = max(start, arrived) + travel if receiving_blocks else max(start, arrived + travel)
                is_last = microbatch == pipeline.num_microbatches - 1
                end = start + (pipeline.duration_s(stage, action) if is_last else seconds)
                events[stage].append(Event(stage, kind, microbatch, start, end, chunk))
                own[microbatch] = free_at[stage] = end
                next_action[stage] += 1
                waiting -= 1
        assert waiting < before, f"schedule {pipeline.schedule} deadlocks with pp={pp}"
    return tuple(event for stage_events in events for event in stage_events)


def _passes(
    pipeline: Pipeline, stage: int, order: Sequence[Action], ends: dict[tuple[int, Kind], _Ends]
) -> dict[tuple[Kind, int], tuple[_Ends | None, _Ends, float, float]]:
    """By (kind, chunk): ends of the passes that it needs first, if any, and its own, both of ``ends``.

    With them the seconds of its message and of any microbatch's pass but the last one's.
    """
    found = {}
    for action in {(action.kind, action.chunk): action for action in reversed(order)}.values():
        own = ends.setdefault((action.chunk * pipeline.pp + stage, action.kind), {})
        source = pipeline.input_of(stage, action)
        sent = None if source is None else ends.setdefault(source[:2], {})
        message_s = 0.0 if source is None else pipeline.message_s(stage, action)
        found[action.kind, action.chunk] = sent, own, message_s, pipeline.duration_s(stage, action)
    return found
