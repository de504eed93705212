"""Process groups, stores, and collectives that a compiler and a recompute policy can see."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.distributed_c10d import _get_default_store, _resolve_process_group  # type: ignore[attr-defined]

_functional = torch.ops._c10d_functional
REDUCE_SCATTER: Any = _functional.reduce_scatter_tensor.default
"""The dispatched operation of ``reduce_scatter``."""


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[n, ...] of every rank, one after the other along dim 0, by an operation that changes nothing in place."""
    gathered = _functional.all_gather_into_tensor(tensor, group.size(), group.group_name)
    return _functional.wait_tensor(gathered)


def reduce_scatter(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part of the sum over ranks, cut along dim 0, by an operation that changes nothing in place."""
    reduced = _functional.reduce_scatter_tensor(tensor, "sum", group.size(), group.group_name)
    return _functional.wait_tensor(reduced)


def all_to_all(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Entry g of [k, ...] from every rank g, to whom went entry g, by an operation that changes nothing in place."""
    ones = [1] * group.size()
    return _functional.wait_tensor(_functional.all_to_all_single(tensor, ones, ones, group.group_name))


def exchange_rows(tensor: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """[sum(received), ...] from every rank in turn, to whom goes its number of rows of [sum(sent), ...].

    Under way: nobody may look at it before ``arrived``.
    """
    return _functional.all_to_all_single(tensor, received, sent, group.group_name)


def arrived(tensor: torch.Tensor) -> torch.Tensor:
    """What ``exchange_rows`` gave, once it is there."""
    return _functional.wait_tensor(tensor)


_c10d: Any = torch.distributed.distributed_c10d


def group_named(name: str) -> dist.ProcessGroup:
    """The process group whose ``group_name`` is ``name``."""
    group: dist.ProcessGroup = _resolve_process_group(name)  # type: ignore[arg-type]
    return group


def new_group(ranks: tuple[int, ...], device: torch.device, purpose: str) -> dist.ProcessGroup:
    """The group of global ``ranks``, made by its members alone and connected at once on ``device``.

    A default group that is bound to a device makes torch split its communicator for every other group, which all ranks
    of the world have to take part in: members alone would wait for ever.  So it is not bound meanwhile.

    Such a group's name torch makes of its ranks and of how many groups a rank has, which must then be equal on all of
    its members.  Those of two stages differ, so here the count is of groups of the same ranks and ``purpose``.
    """
    if device.type == "cuda":
        # messages of one direction between two ranks are meant to go in turn
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "0")
    default: Any = dist.group.WORLD
    bound, default.bound_device_id = default.bound_device_id, None
    alike = f"{purpose} of {','.join(map(str, ranks))}, "
    made = sum(name.startswith(alike) for name in _c10d._world.pg_names.values())
    usual, _c10d._process_group_name = _c10d._process_group_name, lambda *_, **__: f"{alike}{made}"
    try:
        group: dist.ProcessGroup = dist.new_group(
            list(ranks),
            use_local_synchronization=True,
            group_desc=purpose,
            device_id=None if device.type == "cpu" else device,
        )
    finally:
        default.bound_device_id, _c10d._process_group_name = bound, usual
    return group


def default_store() -> Store:
    """The store at which the ranks of the default process group met."""
    return _get_default_store()
