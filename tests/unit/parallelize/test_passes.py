"""No two ranks of a pipeline ever wait for each other: the messages of every rank, played against each other.

The passes of each rank run in this process on scalars, with messages that are only noted down; then all ranks go
through their notes, and a message is over when both its ends are there, as it is at worst with any backend.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from galvatron.parallelize.pipeline import passes
from galvatron.parallelize.pipeline.passes import Border, Inbox, Messages, Outputs, run
from galvatron.parallelize.processes.grid import Neighbour
from galvatron.plan.plan import Schedule
from galvatron.plan.schedules import Action, actions, forwards

PIPELINES: list[tuple[Schedule, int, int, int]] = [
    *((schedule, pp, m, 1) for schedule in ("1f1b", "zero_bubble") for pp, m in ((2, 1), (3, 2), (5, 7))),
    *(("interleaved", pp, rounds * pp, v) for pp in (2, 3, 4) for rounds in (1, 3) for v in (2, 3)),
    *(("zero_bubble", pp, rounds * pp, v) for pp in (2, 3, 4) for rounds in (1, 3) for v in (2, 3)),
    ("interleaved", 2, 6, 4),
    ("interleaved", 7, 14, 2),
]


class Link(NamedTuple):
    """A direction between two ranks: what is sent first is received first."""

    source: int
    target: int
    group: str


class Note(NamedTuple):
    """``send`` begins a message, ``receive`` waits for one, ``left`` until one has been received."""

    kind: str
    link: Link
    nth: int


class Sent:
    def __init__(self, notes: list[Note], link: Link, nth: int) -> None:
        self.wait = lambda: notes.append(Note("left", link, nth))


def notes_of(rank: int, order: list[Action], pp: int, chunks: int, monkeypatch: pytest.MonkeyPatch) -> list[Note]:
    notes: list[Note] = []
    counts: Counter[tuple[str, Link]] = Counter()

    def note(kind: str, link: Link) -> int:
        counts[kind, link] += 1
        notes.append(Note(kind, link, counts[kind, link]))
        return counts[kind, link]

    def isend(tensor: Tensor, dst: int, group: str) -> Sent:
        link = Link(rank, dst, group)
        return Sent(notes, link, note("send", link))

    def recv(buffer: Tensor, src: int, group: str) -> None:
        buffer.zero_()
        note("receive", Link(src, rank, group))

    monkeypatch.setattr(passes, "dist", SimpleNamespace(isend=isend, recv=recv))
    around = chunks > 1
    before, after = (Neighbour((rank + step) % pp, *groups(rank, step, pp)) for step in (-1, 1))  # type: ignore[arg-type]
    grid: Any = SimpleNamespace(
        plan=SimpleNamespace(pp=pp, model_chunks=chunks),
        world=SimpleNamespace(device=torch.device("cpu")),
        before=before if rank or around else None,
        after=after if rank < pp - 1 or around else None,
    )
    entries = [chunk * pp + rank for chunk in range(chunks)]
    shapes, last = ((1,), (2,)), pp * chunks - 1  # hidden states, and what rides along with them
    borders = tuple(Border(shapes, entry == 0, entry == last, trains_before=entry > 0) for entry in entries)
    weight = torch.ones(1, requires_grad=True)

    def forward(microbatch: int, chunk: int, inbox: Inbox | None) -> Outputs:
        hidden, riding = (weight, weight.expand(2)) if inbox is None else inbox.open()
        output = (weight * hidden + riding.sum()).view(1)
        return (output,) if borders[chunk].is_last else (output, riding)

    messages = Messages(grid, borders, torch.float32)
    run(order, forward, messages, lambda microbatch, chunk, is_last: None, lambda chunk, is_last: None)
    messages.finish()
    return notes


def groups(rank: int, step: int, pp: int) -> tuple[str, str]:
    around = {(0, -1), (pp - 1, 1)}
    return ("forward again", "backward again") if (rank, step) in around else ("forward", "backward")


def stuck(programs: list[list[Note]]) -> list[Note]:
    """Where ranks stop for ever; [] if all come to their end."""
    done: set[Note] = set()
    at = [0] * len(programs)
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                kind, link, nth = note = program[at[rank]]
                awaited = {"send": None, "receive": Note("send", link, nth), "left": Note("receive", link, nth)}[kind]
                if awaited is not None and awaited not in done:
                    break
                done.add(note)
                at[rank] += 1
                moved = True
    return [program[place] for program, place in zip(programs, at, strict=True) if place < len(program)]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_no_two_ranks_wait_for_each_other(
    pipeline: tuple[Schedule, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, pp, m, chunks = pipeline
    orders = [actions(schedule, pp, stage, m, chunks) for stage in range(pp)]
    programs = [notes_of(stage, order, pp, chunks, monkeypatch) for stage, order in enumerate(orders)]
    assert not stuck(programs)
    sent = Counter(note.kind for program in programs for note in program)
    assert sent["send"] == sent["receive"] == 2 * 2 * m * (pp * chunks - 1)
    with torch.no_grad():
        order = forwards(schedule, pp, m, chunks)
        assert not stuck([notes_of(stage, order, pp, chunks, monkeypatch) for stage in range(pp)])


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_messages_are_received_in_the_order_in_which_they_are_sent(pipeline: tuple[Schedule, int, int, int]) -> None:
    schedule, pp, m, chunks = pipeline
    orders = [actions(schedule, pp, stage, m, chunks) for stage in range(pp)]
    for rank, order in enumerate(orders):
        assert [a for a in order if a.kind == "forward"] == forwards(schedule, pp, m, chunks)
        for kind, step in (("forward", 1), ("backward", -1)):
            sent = [(a.chunk * pp + rank + step, a.microbatch) for a in order if a.kind == kind]
            peer = (rank + step) % pp
            received = [(a.chunk * pp + peer, a.microbatch) for a in orders[peer] if a.kind == kind]
            inner = [key for key in sent if 0 <= key[0] < pp * chunks]
            first = 0 if kind == "forward" else pp * chunks - 1
            assert inner == [key for key in received if key[0] != first]


def test_one_group_for_both_directions_of_two_stages_would_not_do() -> None:
    """What the check is worth: a message that waits for another of its own rank."""
    there, back = Link(0, 1, "forward"), Link(1, 0, "forward")
    both = [[Note("receive", back, 1), Note("send", there, 1)], [Note("receive", there, 1), Note("send", back, 1)]]
    assert len(stuck(both)) == 2
