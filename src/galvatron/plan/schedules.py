"""In which order a stage runs the passes of its microbatches, and how many it holds.

Takes a schedule, its degrees and a stage; gives actions.  Knows nothing of seconds or bytes.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from typing import Literal, NamedTuple

from .plan import Schedule

Kind = Literal["forward", "backward", "weight"]


class Action(NamedTuple):
    """One pass of one microbatch through one model chunk of a stage.

    Under ``zero_bubble`` a backward computes gradients of inputs alone, and ``weight`` those of parameters.
    """

    kind: Kind
    microbatch: int
    chunk: int = 0


def actions(schedule: Schedule, pp: int, stage: int, num_microbatches: int, model_chunks: int = 1) -> list[Action]:
    """The passes of ``stage``, in order.

    GPipe: all forwards, then all backwards.  1F1B (PipeDream-flush, Narayanan et al. 2021): warm up with as
    many forwards as stages follow, then one forward and one backward in turn, then drain.  Fewer microbatches
    than stages are allowed.  Interleaved 1F1B (ibid., 2.2): the same over chunks, pp microbatches at a time.
    Zero bubble (ZB-H1, Qi et al. 2024): 1F1B, interleaved where there are chunks, whose stage p puts off gradients of
    parameters by p passes.
    """
    if model_chunks > 1:
        turns = [(turn, chunk) for turn in range(0, num_microbatches, pp) for chunk in range(model_chunks)]
        forwards = [Action("forward", turn + i, chunk) for turn, chunk in turns for i in range(pp)]
        backwards = [Action("backward", turn + i, model_chunks - 1 - chunk) for turn, chunk in turns for i in range(pp)]
        warmup = min(2 * (pp - stage - 1) + (model_chunks - 1) * pp, len(forwards))
    else:
        forwards = [Action("forward", i) for i in range(num_microbatches)]
        backwards = [Action("backward", i) for i in range(num_microbatches)]
        warmup = num_microbatches if schedule == "gpipe" else min(pp - stage - 1, num_microbatches)
    if schedule == "zero_bubble":
        return _zero_bubble(forwards, backwards, warmup, stage, model_chunks)
    steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
    return forwards[:warmup] + steady + backwards[len(forwards) - warmup :]


def turns_at_once(schedule: Schedule, num_microbatches: int) -> bool:
    """Whether the last stage, once through its head, goes back with the same microbatch."""
    return schedule != "gpipe" or num_microbatches == 1


def _zero_bubble(
    forwards: list[Action], backwards: list[Action], warmup: int, delay: int, model_chunks: int
) -> list[Action]:
    """The order without weight passes, and one whenever more than ``delay`` wait, the rest at the end.

    That of the chunk of which most wait, so that no chunk ever keeps much.
    """
    order, waiting = forwards[:warmup], [deque[Action]() for _ in range(model_chunks)]
    for i, backward in enumerate(backwards):
        order += [*forwards[warmup + i : warmup + i + 1], backward]
        waiting[backward.chunk].append(Action("weight", backward.microbatch, backward.chunk))
        if i >= delay:
            order.append(max(reversed(waiting), key=len).popleft())
    return order + [weight for of_chunk in reversed(waiting) for weight in of_chunk]


def forwards(schedule: Schedule, pp: int, num_microbatches: int, model_chunks: int = 1) -> list[Action]:
    """The forward passes of ``actions``, which every stage runs in the same order: an evaluation."""
    order = actions(schedule, pp, 0, num_microbatches, model_chunks)
    return [action for action in order if action.kind == "forward"]


def on_their_way(pp: int, model_chunks: int) -> int:
    """How many gradients of a chunk's inputs may have left it and not have come, before the next one is waited for.

    A stage in chunks is ahead of the one that takes them by up to some pp / 2 passes; if it waited for each, it would
    lose what its chunks gain.  All of its chunks together have as many as all but one: nothing precedes the first
    stage's first.  [Derived: replays of equal passes, pp from 2 to 32, see the test of ``cost.pipeline``.]
    """
    return 1 if model_chunks == 1 else -(-(pp // 2 + 2) // (model_chunks - 1))


class InFlight(NamedTuple):
    """The most microbatches that a chunk holds something of at once.

    Attributes:
        alive: with all their activations, from forward to backward.
        waiting: with what their weight pass needs, while ``alive`` others are.
        turned: how many of the alive may be waiting instead.
    """

    alive: int
    waiting: int = 0
    turned: int = 0


def in_flight(
    schedule: Schedule, pp: int, stage: int, num_microbatches: int, model_chunks: int = 1
) -> tuple[InFlight, ...]:
    """What every chunk of ``stage`` holds at its most."""
    if schedule in ("gpipe", "1f1b"):
        return (InFlight(num_microbatches if schedule == "gpipe" else min(num_microbatches, pp - stage)),)
    # what is in flight repeats every round of pp microbatches, so a few rounds see the most there is
    return _counted_in_flight(schedule, pp, stage, min(num_microbatches, 4 * pp), model_chunks)


@lru_cache(maxsize=4096)
def held_at_once(
    schedule: Schedule, pp: int, stage: int, num_microbatches: int, model_chunks: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """What all chunks of ``stage`` hold together, at every moment that may be the fullest.

    A moment has of every chunk how many microbatches are alive and how many wait (see ``InFlight``).
    """
    held = [[0, 0] for _ in range(model_chunks)]
    moments: dict[tuple[tuple[int, int], ...], None] = {}
    # as in ``in_flight``, a few rounds of pp microbatches see all there is
    for kind, _, chunk in actions(schedule, pp, stage, min(num_microbatches, 4 * pp), model_chunks):
        if kind == "weight":
            held[chunk][1] -= 1
            continue
        held[chunk][0] += 1 if kind == "forward" else -1
        held[chunk][1] += kind == "backward" and schedule == "zero_bubble"
        moments[tuple((alive, waiting) for alive, waiting in held)] = None
    return tuple(moments)


@lru_cache(maxsize=4096)
def _counted_in_flight(schedule: Schedule, pp: int, stage: int, m: int, chunks: int) -> tuple[InFlight, ...]:
    alive, waiting = [0] * chunks, [0] * chunks
    most, most_waiting, most_held = [0] * chunks, [0] * chunks, [0] * chunks
    for kind, _, chunk in actions(schedule, pp, stage, m, chunks):
        alive[chunk] += {"forward": 1, "backward": -1, "weight": 0}[kind]
        if schedule == "zero_bubble":
            waiting[chunk] += {"forward": 0, "backward": 1, "weight": -1}[kind]
        most[chunk] = max(most[chunk], alive[chunk])
        most_waiting[chunk] = max(most_waiting[chunk], waiting[chunk])
        most_held[chunk] = max(most_held[chunk], alive[chunk] + waiting[chunk])
    columns = zip(most, most_waiting, most_held, strict=True)
    return tuple(InFlight(a, held - a, max(w - (held - a), 0)) for a, w, held in columns)
