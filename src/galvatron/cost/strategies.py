"""Many strategies as columns of integers, so that one formula costs them all at once.

Takes LayerStrategy records or arrays of degrees; gives columns and records back.  Knows nothing of costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from galvatron.core.model import OFFLOADS, RECOMPUTES
from galvatron.plan.plan import LayerStrategy

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
DEGREES = ("tp", "ulysses", "cp", "ep", "dp_shard", "dp_replicate", "zero")
MAX_KEYED = 2**15  # four degrees below it make one whole number
NONE, SELECTIVE, MLP, LINEARS, FULL = range(len(RECOMPUTES))


@dataclass(frozen=True)
class Strategies:
    """One strategy a row: the fields of LayerStrategy, ``recompute`` and ``offload`` as indices of their words."""

    tp: Ints
    ulysses: Ints
    cp: Ints
    ep: Ints
    dp_shard: Ints
    dp_replicate: Ints
    zero: Ints
    recompute: Ints
    offload: Ints

    @classmethod
    def of(cls, strategies: Iterable[LayerStrategy]) -> Self:
        """The columns of some records."""
        rows = [
            (*(getattr(s, name) for name in DEGREES), RECOMPUTES.index(s.recompute), OFFLOADS.index(s.offload))
            for s in strategies
        ]
        return cls.of_rows(rows)

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[int, ...]]) -> Self:
        """The columns of tuples in the order of the fields."""
        return cls.of_table(np.array(rows, dtype=np.int64).reshape(len(rows), len(fields(cls))))

    @classmethod
    def of_table(cls, table: Ints) -> Self:
        """The columns of [row, field]."""
        return cls(*(np.ascontiguousarray(column) for column in table.T))

    def __len__(self) -> int:
        return len(self.tp)

    def __getitem__(self, row: int) -> LayerStrategy:
        """One row as a record."""
        degrees = {field.name: int(getattr(self, field.name)[row]) for field in fields(self)}
        words = {"recompute": RECOMPUTES[degrees["recompute"]], "offload": OFFLOADS[degrees["offload"]]}
        return LayerStrategy.model_validate({**degrees, **words})

    def rows(self) -> list[tuple[int, ...]]:
        """Every row as a tuple of its fields."""
        return list(zip(*(getattr(self, field.name).tolist() for field in fields(self)), strict=True))

    def found_in(self, others: Self) -> Ints:
        """For every row the index of the same one among ``others``, which are distinct, or -1."""
        number = np.zeros(len(self) + len(others), dtype=np.int64)
        for field in fields(self):
            column = np.concatenate([getattr(self, field.name), getattr(others, field.name)])
            values = np.unique(column)  # a few degrees or levels
            number = number * len(values) + np.searchsorted(values, column)
        own, known = number[: len(self)], number[len(self) :]
        order = np.argsort(known)
        at = order[np.minimum(np.searchsorted(known, own, sorter=order), len(known) - 1)] if len(known) else own
        found: Ints = np.where(known[at] == own, at, -1) if len(known) else np.full(len(self), -1)
        return found

    def take(self, at: Ints | NDArray[np.bool_]) -> Self:
        """Some rows, by index or mask."""
        return type(self)(*(getattr(self, field.name)[at] for field in fields(self)))

    @cached_property
    def sequence_degree(self) -> Ints:
        """In how many chunks hidden states are cut along the sequence."""
        return self.tp * self.ulysses * self.cp

    @cached_property
    def dp(self) -> Ints:
        """In how many chunks hidden states are cut along the batch."""
        return self.dp_shard * self.dp_replicate

    @cached_property
    def cuts(self) -> tuple[Self, Ints]:
        """One row for every cut and level of recompute, and of every row which it is of those.

        What passes through a unit depends on nothing else.
        """
        ranks = self.sequence_degree * self.dp
        if not len(ranks) or (ranks != ranks[0]).any():
            return self, np.arange(len(ranks))
        base, levels = int(max(ranks[0], self.ep.max())) + 1, len(RECOMPUTES)
        key = (((self.tp * base + self.ulysses) * base + self.cp) * base + self.ep) * levels + self.recompute
        _, first, which = np.unique(key, return_index=True, return_inverse=True)
        return self.take(first), which

    @cached_property
    def parameter_cuts(self) -> tuple[Self, Ints]:
        """One row for every way to cut and keep parameters, and of every row which it is of those.

        What is held, gathered and summed depends on nothing else but whether it is every microbatch's.
        """
        base = int(max(column.max(initial=0) for column in (self.tp, self.ep, self.shard, self.replicas))) + 1
        if base > MAX_KEYED:
            return self, np.arange(len(self))
        key = ((self.tp * base + self.ep) * base + self.shard) * base + self.replicas
        _, first, which = np.unique(key, return_index=True, return_inverse=True)
        return self.take(first), which

    @cached_property
    def shard(self) -> Ints:
        """Over how many ranks, tp apart, ZeRO shards a parameter."""
        return np.where(self.zero > 0, self.ulysses * self.cp * self.dp_shard, 1)

    @cached_property
    def replicas(self) -> Ints:
        """How many ranks hold the same shard."""
        replicas: Ints = self.ulysses * self.cp * self.dp // self.shard
        return replicas

    @cached_property
    def expert_shard(self) -> Ints:
        """Over how many ranks, tp x ep apart, ZeRO shards an expert's parameter."""
        shard: Ints = np.maximum(self.shard // self.ep, 1)
        return shard

    @cached_property
    def expert_replicas(self) -> Ints:
        """How many ranks hold the same shard of an expert."""
        replicas: Ints = self.ulysses * self.cp * self.dp // (self.ep * self.expert_shard)
        return replicas
