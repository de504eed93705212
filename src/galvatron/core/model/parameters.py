"""ParameterSpec: one parameter of a unit, and how tensor and expert parallelism cut it."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, StrictBool, model_validator

from ..numbers import Count
from ..records import Record


class Cut(Record):
    """How tensor parallelism slices a parameter: along ``dim``, in segments one after the other, by equal blocks.

    ``segments``: how many indivisible blocks (heads, kv heads, ffn or vocabulary rows) each segment holds: ``(8,)`` of
    a plain matrix, ``(8, 8, 8)`` of a fused query, key and value, ``(8, 2, 2)`` where kv heads are fewer.  tp rank r
    takes its run of blocks from every segment.  When tp does not divide them all the rule is ``uneven``: ``refuse``
    the plan, ``whole`` (every rank keeps the parameter whole and uses its part: kv heads fewer than tp), ``shared``
    (of a segment of fewer blocks than tp, tp / blocks ranks in a row hold the same one: kv heads in one matrix with
    queries), or ``ceil`` (ranks hold ceil(blocks / tp) or fewer: vocabulary).
    """

    dim: Annotated[int, Field(strict=True, ge=0, le=7)]
    segments: tuple[Count, ...] = Field(min_length=1, max_length=8)
    uneven: Literal["refuse", "whole", "shared", "ceil"] = "refuse"

    @property
    def blocks(self) -> int:
        """What tp must divide to divide every segment."""
        return math.gcd(*self.segments)

    def is_whole(self, tp: int) -> bool:
        """Whether every tp rank keeps the whole parameter."""
        return tp == 1 or (self.uneven == "whole" and self.blocks % tp != 0)

    def misfit(self, tp: int) -> int | None:
        """How many blocks there are that ``tp`` must divide, or be a multiple of where they are kept, but does not."""
        counts = self.segments if self.uneven == "shared" else (self.blocks,)
        odd = (blocks for blocks in counts if blocks % tp and (self.uneven == "refuse" or tp % blocks))
        return None if self.uneven == "ceil" else next(odd, None)

    def copies(self, tp: int) -> tuple[int, ...]:
        """On how many of ``tp`` ranks each of a rank's ``ranges`` is."""
        if self.is_whole(tp):
            return (tp,)
        return tuple(max(tp // blocks, 1) if self.uneven == "shared" else 1 for blocks in self.segments)

    def leaves_ranks_empty(self, tp: int) -> bool:
        """Whether the first ranks take so many blocks that the last has none."""
        return self.uneven == "ceil" and (tp - 1) * math.ceil(self.blocks / tp) >= self.blocks

    def ranges(self, size: int, tp: int, tp_rank: int) -> list[tuple[int, int]]:
        """The (start, stop) ranges along ``dim`` of a ``size``-long dim that ``tp_rank`` of ``tp`` holds."""
        if self.is_whole(tp):
            return [(0, size)]
        block, before, found = size // sum(self.segments), 0, []
        for blocks, copies in zip(self.segments, self.copies(tp), strict=True):
            run = tp_rank // copies
            start, stop = (before + min(at * math.ceil(blocks / tp), blocks) for at in (run, run + 1))
            found.append((start * block, stop * block))
            before += blocks
        return found


class ParameterSpec(Record):
    """One parameter of a unit: its name within the model's unit, full shape ([] of a number) and tensor-parallel cut.

    ``experts``: dim 0 counts experts, which expert parallelism deals out; every expert is cut by tp alike.
    ``shared``: later layers of the stack use it too, so that every stage of theirs has a copy, whole on every rank.
    ``trainable``: whether it has a gradient and optimizer states; a frozen one is held and gathered alone.
    """

    name: str
    shape: tuple[Count, ...] = Field(max_length=8)
    cut: Cut | None = None
    experts: StrictBool = False
    shared: StrictBool = False
    trainable: StrictBool = True

    @model_validator(mode="after")
    def _blocks_tile_the_dim(self) -> Self:
        if self.experts and len(self.shape) not in (2, 3):
            raise ValueError(f"{self.name} of experts must have 2 or 3 dims, got shape {list(self.shape)}")
        cut = self.cut
        if cut is not None and (cut.dim >= len(self.shape) or self.shape[cut.dim] % sum(cut.segments)):
            raise ValueError(
                f"{self.name} of shape {list(self.shape)} cannot be cut along dim {cut.dim} into segments of "
                f"{list(cut.segments)} equal blocks"
            )
        return self

    @property
    def num_elements(self) -> int:
        """Of the whole parameter."""
        return math.prod(self.shape)

    def copies(self, tp: int) -> tuple[int, ...]:
        """On how many of ``tp`` ranks, in a row, each run is that a rank holds of it."""
        return (tp,) if self.cut is None else self.cut.copies(tp)

    def local_shape(self, tp: int, tp_rank: int = 0, ep: int = 1) -> tuple[int, ...]:
        """The shape that ``tp_rank`` of any of ``ep`` expert ranks holds; tp rank 0 holds the largest."""
        shape = (self.shape[0] // ep, *self.shape[1:]) if self.experts else self.shape
        if self.cut is None:
            return shape
        size = sum(stop - start for start, stop in self.cut.ranges(shape[self.cut.dim], tp, tp_rank))
        return (*shape[: self.cut.dim], size, *shape[self.cut.dim + 1 :])


def shard_dim(shape: tuple[int, ...], num_shards: int) -> int:
    """The dim of a tensor that ZeRO shards: 0, as FSDP2 does; where experts do not divide, one of theirs that does.

    FSDP2 shards no other dim than 0 unevenly.
    """
    if len(shape) != 3 or shape[0] % num_shards == 0:
        return 0
    return next((dim for dim in (1, 2) if shape[dim] % num_shards == 0), 0)
