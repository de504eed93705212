"""Whole tensors on rank 0, from what every rank holds of them: one at a time, so that memory stays bounded by one.

Takes the parts of a parallel model; knows nothing of plans or of files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from ..processes.ranks import all_gather, communication_device, on_rank_zero, rank
from .pieces import LocalParameter, box, boxes_of

Shapes = dict[str, tuple[int, ...]]
_Boxes = list[tuple[tuple[int, ...], tuple[int, ...]]]
_Table = list[dict[str, tuple[tuple[int, ...], _Boxes]]]


def gather_whole(
    parameters: Sequence[LocalParameter], consume: Callable[[Shapes, Iterator[torch.Tensor]], None]
) -> None:
    """Call ``consume(shapes, tensors)`` on rank 0: shapes by name, and float32 values on the CPU in order.

    A collective call.  What ``consume`` raises is raised on every rank.
    """
    parts = {part.name: part for part in parameters if part.is_primary}
    table: _Table = all_gather({name: (part.global_shape, _boxes(part)) for name, part in parts.items()})
    shapes = {name: shape for held_by_rank in table for name, (shape, _) in held_by_rank.items()}
    if rank() != 0:
        for name in shapes:
            if name in parts and _boxes(parts[name]):
                dist.send(_flat(parts[name]), dst=0)

    def receive() -> None:
        tensors = _gathered(parts, table, shapes)
        try:
            consume(shapes, tensors)
        finally:
            for _ in tensors:  # after a failure the other ranks still wait for their sends to be received
                pass

    on_rank_zero(receive)


def _boxes(part: LocalParameter) -> _Boxes:
    return [(offset, tuple(values.shape)) for offset, values in boxes_of(part.tensor, part.primary_pieces)]


def _flat(part: LocalParameter) -> torch.Tensor:
    """All boxes that this rank gives, concatenated: [number of elements], on the part's device."""
    return torch.cat([values.reshape(-1) for _, values in boxes_of(part.tensor, part.primary_pieces)])


def _gathered(parts: dict[str, LocalParameter], table: _Table, shapes: Shapes) -> Iterator[torch.Tensor]:
    """On rank 0: every whole tensor of ``shapes``, on the CPU, in order."""
    for name, shape in shapes.items():
        tensor = torch.empty(shape)
        for owner, held_by_rank in enumerate(table):
            boxes = held_by_rank[name][1] if name in held_by_rank else []
            if boxes and owner == 0:
                _place(tensor, boxes, _flat(parts[name]).cpu())
            elif boxes:
                count = sum(math.prod(size) for _, size in boxes)
                received = torch.empty(count, device=communication_device())
                dist.recv(received, src=owner)
                _place(tensor, boxes, received.cpu())
        yield tensor


def _place(target: torch.Tensor, boxes: _Boxes, flat: torch.Tensor) -> None:
    """Copy the concatenated values ``flat`` of ``boxes`` (offset, size) to where they belong in ``target``."""
    for (offset, size), values in zip(boxes, flat.split([math.prod(size) for _, size in boxes]), strict=True):
        box(target, offset, size).copy_(values.view(size))
