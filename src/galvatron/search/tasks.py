"""The outsides of plans: every batch, pipeline degree, microbatches and schedule that a model may be trained with.

Takes a world, a model and limits; gives tasks.  Knows nothing of strategies or costs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from galvatron.core.model import ModelSpec
from galvatron.plan.axes import divisors
from galvatron.plan.plan import Schedule
from galvatron.plan.rules import STACKED_SCHEDULES, check_schedule

from .limits import Limits

MAX_CHUNKS = 8
"""Most model chunks a stage that are tried: beyond it a bubble of (pp - 1) / v microbatches hardly shrinks while
messages multiply [Assumed]."""


@dataclass(frozen=True, slots=True)
class Task:
    """The outside of a plan: what is fixed while layers are divided and strategies chosen."""

    global_batch_size: int
    pp: int
    num_microbatches: int
    schedule: Schedule = "1f1b"
    model_chunks: int = 1


def tasks(world_size: int, num_layers: int, batch_sizes: Sequence[int], limits: Limits) -> Iterator[Task]:
    """Every task that can differ.

    Without a pipeline there is nothing to schedule, so one stage is no answer where a schedule or chunks are asked for.
    GPipe has 1F1B's objective and holds no fewer microbatches, so it is searched where 1F1B is not allowed; zero
    bubble in chunks holds more than interleaved 1F1B and takes less, and is searched where that is not allowed (else
    the replay looks at it, ``engine``).
    """
    schedules: list[tuple[Schedule, int]] = [("1f1b", 1)]
    schedules += [("interleaved", v) for v in range(2, MAX_CHUNKS + 1)]
    alone = not limits.allows("schedule", "interleaved")
    schedules += [("zero_bubble", v) for v in range(1, MAX_CHUNKS + 1 if alone else 2)]
    if not limits.allows("schedule", "1f1b"):
        schedules.insert(0, ("gpipe", 1))
    asks = limits.fix.get("schedule", "1f1b") != "1f1b" or limits.fix.get("model_chunks", 1) != 1
    for batch, pp in itertools.product(batch_sizes, divisors(world_size)):
        if pp > num_layers or not limits.allows("pp", pp) or (asks and pp == 1):
            continue
        for m in divisors(batch):
            if not limits.allows("num_microbatches", m):
                continue
            if pp == 1:
                yield Task(batch, pp, m)
            else:
                yield from (Task(batch, pp, m, s, v) for s, v in schedules if _worth(s, v, pp, m, num_layers, limits))


def suits(task: Task, spec: ModelSpec) -> bool:
    """Whether a model can be trained so: several stacks by schedules of one chunk, a contrast by one microbatch."""
    if spec.task == "contrast" and task.num_microbatches > 1:
        return False
    return spec.stacks == 1 or task.pp == 1 or task.schedule in STACKED_SCHEDULES


def _worth(schedule: Schedule, chunks: int, pp: int, m: int, num_layers: int, limits: Limits) -> bool:
    if pp * chunks > num_layers or not (limits.allows("schedule", schedule) and limits.allows("model_chunks", chunks)):
        return False
    # with one microbatch there is nothing to interleave with, and no weight gradient to put off
    return check_schedule(schedule, pp, m, chunks) is None and (m > 1 or schedule in ("1f1b", "gpipe"))
