"""The processes of a run: their rank, device and (cached) process groups."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

from galvatron.core.errors import ConfigError
from galvatron.internals import HashStore, Store, new_group

DeviceType = Literal["cpu", "cuda", "auto"]


@dataclass(frozen=True, eq=False)
class World:
    """This process's place in the default process group, and the groups made so far."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: Literal["gloo", "nccl"]
    _groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = field(default_factory=dict)

    def group(self, ranks: tuple[int, ...], purpose: str = "axes") -> dist.ProcessGroup:
        """The group of global ``ranks`` (ascending, this rank among them), made on first use by its members alone.

        Every rank must ask for overlapping groups in one common order, or their creation deadlocks; ``purpose``
        keeps groups of equal ranks apart where traffic must not queue behind other traffic.
        """
        key = (purpose, ranks)
        if key not in self._groups:
            self._groups[key] = new_group(ranks, self.device, purpose)
        return self._groups[key]


def init_world(device: DeviceType = "auto", store: Store | None = None) -> World:
    """Join the world that the environment describes (torchrun's RANK, WORLD_SIZE, ...), or make one of one process.

    Args:
        device: ``auto`` takes a GPU where there is one.
        store: where the ranks meet; without it, at MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: ``device="cuda"`` without a usable GPU for this process, or an address where nobody can meet.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = _cuda_device(local_rank) if device == "cuda" else torch.device("cpu")
    backend: Literal["gloo", "nccl"] = "nccl" if device == "cuda" else "gloo"
    if not dist.is_initialized():
        device_id = place if backend == "nccl" else None
        if store is not None:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=device_id)
        elif "RANK" in os.environ:
            _join(backend, device_id)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, device_id=device_id)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, place, backend)


def _join(backend: str, device_id: torch.device | None) -> None:
    try:
        dist.init_process_group(backend, device_id=device_id)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"the processes cannot meet at MASTER_ADDR:MASTER_PORT={where} ({str(error).splitlines()[0]}); "
            "give a host that all reach and a port that is free on it"
        ) from None


def _cuda_device(local_rank: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise ConfigError(
            f"device=cuda needs a GPU for local rank {local_rank} but this node has {count}; "
            "start fewer processes or use device=cpu"
        )
    place = torch.device("cuda", local_rank)
    torch.cuda.set_device(place)
    return place


def destroy_world() -> None:
    """Leave the default process group and all others."""
    if dist.is_initialized():
        dist.destroy_process_group()
