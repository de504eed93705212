"""Whether the parts that ranks hold make up every parameter exactly once.

Takes what each rank says it holds (boxes, no tensors); gives a list of complaints.  Knows nothing of plans.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

Ints = tuple[int, ...]
Box = tuple[Ints, Ints]
"""(offset, size) along every dim."""


@dataclass(frozen=True, kw_only=True)
class Holding:
    """One rank's part of one parameter: global boxes, and a checksum of the values it ended with."""

    rank: int
    name: str
    global_shape: Ints
    boxes: tuple[Box, ...]
    replicas: int
    is_primary: bool
    checksum: int


def find_gaps(shape: Ints, boxes: Sequence[Box]) -> str | None:
    """Why ``boxes`` do not cover a tensor of ``shape`` exactly once, in words; None if they do."""
    for offset, size in boxes:
        if any(start < 0 or start + length > full for start, length, full in zip(offset, size, shape, strict=True)):
            return f"box at {offset} of size {size} leaves shape {shape}"
    for a, b in itertools.combinations(boxes, 2):
        if _overlap(a, b):
            return f"boxes {a} and {b} overlap in shape {shape}"
    covered, total = sum(math.prod(size) for _, size in boxes), math.prod(shape)
    return None if covered == total else f"boxes hold {covered} of the {total} elements of shape {shape}"


def check_holdings(holdings: Iterable[Holding], shapes: dict[str, Ints]) -> list[str]:
    """Complaints about the world's holdings; ``shapes`` are the parameters that must be there.

    Every parameter is covered exactly once by its primary parts; every part has one primary, as many
    holders as it claims, and the same bits on all of them.
    """
    by_name: dict[str, list[Holding]] = defaultdict(list)
    for holding in holdings:
        if any(math.prod(size) for _, size in holding.boxes):  # more ranks than rows leave some with nothing
            by_name[holding.name].append(holding)
    problems = [f"{name}: no such parameter in the model" for name in by_name.keys() - shapes.keys()]
    for name, shape in shapes.items():
        problems += [f"{name}: {problem}" for problem in _check_parameter(by_name[name], shape)]
    return problems


def _check_parameter(holdings: list[Holding], shape: Ints) -> Iterator[str]:
    for holding in holdings:
        if holding.global_shape != shape:
            yield f"rank {holding.rank} says the global shape is {holding.global_shape}, the model's is {shape}"
    gap = find_gaps(shape, [box for holding in holdings if holding.is_primary for box in holding.boxes])
    if gap:
        yield f"primaries: {gap}"
    parts: dict[frozenset[Box], list[Holding]] = defaultdict(list)
    for holding in holdings:
        parts[frozenset(holding.boxes)].append(holding)
    for part in parts.values():
        yield from _check_part(part)


def _check_part(part: list[Holding]) -> Iterator[str]:
    ranks = [holding.rank for holding in part]
    primaries = [holding.rank for holding in part if holding.is_primary]
    if len(primaries) != 1:
        yield f"the part at {part[0].boxes[0]} on ranks {ranks} has primaries {primaries}, must be one"
    claims = {holding.replicas for holding in part}
    if claims != {len(part)}:
        yield f"the part at {part[0].boxes[0]} claims replicas={sorted(claims)} but ranks {ranks} hold it"
    if len({holding.checksum for holding in part}) != 1:
        yield f"the part at {part[0].boxes[0]} ends with different bits on ranks {ranks}"


def _overlap(a: Box, b: Box) -> bool:
    return all(
        max(a_start, b_start) < min(a_start + a_size, b_start + b_size)
        for a_start, a_size, b_start, b_size in zip(*a, *b, strict=True)
    )
