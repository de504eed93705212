"""Which boxes of which global tensor this rank holds.

A parameter is cut twice: by tensor parallelism (a run of blocks from every segment, along the cut's dim)
and by FSDP2 (a chunk of what is left, mostly of dim 0); experts are dealt out before.  The result is a few boxes;
loading, checkpoints, export and the parity check all speak of these boxes and need no knowledge of strategies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from galvatron.core.model import ParameterSpec, shard_dim


@dataclass(frozen=True)
class Piece:
    """A box of a local tensor and the box of the global tensor that it is; offsets and size per dim.

    ``copies``: on how many tensor-parallel ranks it is, of a parameter that these cut but for such boxes;
    ``is_first``: whether this is the first of them.
    """

    local_offset: tuple[int, ...]
    global_offset: tuple[int, ...]
    size: tuple[int, ...]
    copies: int = 1
    is_first: bool = True


@dataclass(eq=False)
class LocalParameter:
    """What this rank holds of one parameter.

    Attributes:
        name: the parameter's Hugging Face name; a tied head goes by the embedding's.
        tensor: float32 on the run's device, of this rank's shape; shares memory with the FSDP2 shard.
            ``tensor.grad`` is this rank's part of the exact gradient after ``ParallelModel.train_step``; a frozen
            parameter's ``requires_grad`` is False and its gradient None.
        global_shape: the shape of the whole parameter.
        pieces: the boxes of ``tensor``; together they cover it.  Empty where FSDP2 left this rank nothing.
        replicas: how many ranks of the world hold this same part; of a piece with copies, times these.
        is_primary: True on exactly one of them: the one that writes checkpoints; of copies, the first.
        travels_with: the unit beside whose moments its own pass through the device, where the plan keeps them in host
            memory; None where they stay on the device.
    """

    name: str
    tensor: nn.Parameter
    global_shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    replicas: int
    is_primary: bool
    travels_with: str | None = None

    @property
    def primary_pieces(self) -> tuple[Piece, ...]:
        """Those that this rank writes, and no other."""
        return tuple(piece for piece in self.pieces if self.is_primary and piece.is_first)


def shard_rows(num_rows: int, num_shards: int, shard: int) -> tuple[int, int]:
    """The (start, stop) rows of a dim that FSDP2 gives to ``shard``: torch.chunk's, some of them empty."""
    chunk = math.ceil(num_rows / num_shards)
    return min(shard * chunk, num_rows), min((shard + 1) * chunk, num_rows)


def pieces_of(
    parameter: ParameterSpec, tp: int, tp_rank: int, num_shards: int, shard: int, ep: int = 1, ep_rank: int = 0
) -> tuple[Piece, ...]:
    """The boxes that tensor-parallel rank ``tp_rank`` and FSDP2 shard ``shard`` hold of ``parameter``.

    Of experts those that are dealt to ``ep_rank`` of ``ep``.
    """
    if not parameter.shape:  # a number
        return (Piece((), (), ()),)
    local_shape = parameter.local_shape(tp, tp_rank, ep)
    boxes = list(_tp_boxes(parameter, tp, tp_rank))
    if parameter.experts:
        boxes = [_dealt(box, ep_rank * local_shape[0], local_shape[0]) for box in boxes]
    dim = shard_dim(local_shape, num_shards)
    rows = shard_rows(local_shape[dim], num_shards, shard)
    return tuple(piece for box in boxes if (piece := _clip(box, dim, *rows)) is not None)


def _dealt(piece: Piece, first: int, count: int) -> Piece:
    """Of a box of all experts, ``count`` from the ``first`` on."""
    return replace(piece, global_offset=_at(piece.global_offset, 0, first), size=_at(piece.size, 0, count))


def _tp_boxes(parameter: ParameterSpec, tp: int, tp_rank: int) -> Iterator[Piece]:
    """The boxes of the tensor-parallel cut alone."""
    shape, cut = parameter.shape, parameter.cut
    zeros = (0,) * len(shape)
    if cut is None or cut.is_whole(tp):
        yield Piece(zeros, zeros, shape)
        return
    position, dim = 0, cut.dim
    for (start, stop), copies in zip(cut.ranges(shape[dim], tp, tp_rank), cut.copies(tp), strict=True):
        offset, size = _at(zeros, dim, start), _at(shape, dim, stop - start)
        yield Piece(_at(zeros, dim, position), offset, size, copies, tp_rank % copies == 0)
        position += stop - start


def _clip(piece: Piece, dim: int, start: int, stop: int) -> Piece | None:
    """The part of ``piece`` within ``start`` ... ``stop`` of the local ``dim``, whose offsets count from ``start``."""
    low = max(piece.local_offset[dim], start)
    high = min(piece.local_offset[dim] + piece.size[dim], stop)
    if low >= high or 0 in piece.size:
        return None
    return replace(
        piece,
        local_offset=_at(piece.local_offset, dim, low - start),
        global_offset=_at(piece.global_offset, dim, piece.global_offset[dim] + low - piece.local_offset[dim]),
        size=_at(piece.size, dim, high - low),
    )


def _at(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def box(tensor: torch.Tensor, offset: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """The view of ``tensor`` at ``offset`` of ``size``."""
    return tensor[tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))]


def boxes_of(local: torch.Tensor, pieces: Sequence[Piece]) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """(offset in the global tensor, view of ``local``) of every piece that holds anything."""
    for piece in pieces:
        if math.prod(piece.size) > 0:
            yield piece.global_offset, box(local.detach(), piece.local_offset, piece.size)


def by_copies(parameter: LocalParameter, local: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """``local``, of the parameter's shape on this rank, in views with as many copies each: all of it where alike."""
    if all(piece.copies == 1 for piece in parameter.pieces):
        return [(1, local)]
    return [(piece.copies, box(local, piece.local_offset, piece.size)) for piece in parameter.pieces]


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite, found without a copy: a NaN is both least and largest."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())
