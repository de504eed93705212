"""Blocks of causal attention: which runs of queries see which runs of keys, and by what mask.

A run is a range of positions; all runs of a rank are equally long, ascending, and its tokens are theirs one after the
other.  Of two runs from different ranks one lies before the other, so that only windows need masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Queries of some rows that see keys of some columns: all of them, causally, or what a window says."""

    rows: slice
    columns: slice
    causal: bool = False
    masked: bool = False


def seen(queries: list[range], keys: list[range], window: int | None) -> Iterator[Block]:
    """For every run of queries the runs of keys that it sees; neighbours that see the same are one."""
    return _merged(_seen(queries, keys, window))


def _seen(queries: list[range], keys: list[range], window: int | None) -> Iterator[Block]:
    width = len(queries[0])
    for nth, query in enumerate(queries):
        first = 0 if window is None else query.start - window + 1
        seen = [i for i, key in enumerate(keys) if key.start < query.stop and key.stop > first]
        if seen:
            partly = window is not None and keys[seen[0]].start <= query[-1] - window
            whole = keys[seen[-1]].stop <= query.start + 1 and not partly
            rows = slice(nth * width, (nth + 1) * width)
            yield Block(rows, slice(seen[0] * width, (seen[-1] + 1) * width), masked=not whole)


def _merged(blocks: Iterator[Block]) -> Iterator[Block]:
    last: Block | None = None
    for block in blocks:
        if last is None or block.masked or (last.columns, last.masked) != (block.columns, False):
            if last is not None:
                yield last
            last = block
        else:
            last = Block(slice(last.rows.start, block.rows.stop), block.columns)
    if last is not None:
        yield last


def visible(queries: list[range], keys: list[range], block: Block, window: int | None, device: torch.device) -> Tensor:
    """[rows, columns] bool: which keys of a block a query sees."""
    distance = positions(queries, block.rows, device)[:, None] - positions(keys, block.columns, device)[None, :]
    return (distance >= 0) & (distance < window) if window is not None else distance >= 0


def positions(runs: list[range], tokens: slice, device: torch.device) -> Tensor:
    """The positions of some ``tokens`` of ``runs`` (equally long), made on ``device``: nothing waits for a copy."""
    width = len(runs[0])
    first, last = tokens.start // width, -(-tokens.stop // width)
    own = torch.cat([torch.arange(run.start, run.stop, device=device) for run in runs[first:last]])
    return own[tokens.start - first * width : tokens.stop - first * width]
