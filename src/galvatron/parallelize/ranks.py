"""Agreement between ranks: one rank acts, all hear the result; one rank fails, all raise.

Works without an initialised process group too: then there is one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """This process's rank in the world; 0 without a world."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes of the world; 1 without a world."""
    return dist.get_world_size() if dist.is_initialized() else 1


def communication_device() -> torch.device:
    """Where tensors must live for the world's backend to move them."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and give its (picklable) result to every rank; an exception is raised on all."""
    if world_size() == 1:
        return action()
    box: list[tuple[T | None, Exception | None] | None] = [None]
    if rank() == 0:
        try:
            box = [(action(), None)]
        except Exception as error:
            box = [(None, error)]
    dist.broadcast_object_list(box, src=0)
    result, failure = cast("tuple[T, Exception | None]", box[0])
    if failure is not None:
        raise failure
    return result


def together(action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; if it fails on any, every rank raises the lowest failing rank's exception."""
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    first = next((error for error in all_gather(failure) if error is not None), None)
    if first is not None:
        raise first
    return cast(T, result)


def all_gather(value: T) -> list[T]:
    """Every rank's picklable ``value``, by rank."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_max(values: Sequence[float]) -> list[float]:
    """The elementwise maximum of ``values`` over all ranks, in float64."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=communication_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return cast("list[float]", tensor.tolist())
