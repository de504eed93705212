"""Ranks of two runs that were given one address do not join each other."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from galvatron.core.errors import WorldError
from galvatron.parallelize.processes.meeting import meet

SOON = timedelta(seconds=20)


def environment(rank: int, port: int, world_size: int = 2) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def first_of(run: str) -> tuple[dist.Store, int]:
    """Rank 0's store, at a port that was free."""
    store = meet(run, environment(0, 0), SOON)
    assert isinstance(store, dist.PrefixStore)
    return store, store.underlying_store.port


def test_ranks_of_one_run_meet() -> None:
    first, port = first_of("run A")
    second = meet("run A", environment(1, port), SOON)
    first.set("key", "value")
    assert second.get("key") == b"value"


def test_a_rank_of_another_run_is_refused() -> None:
    _alive, port = first_of("run A")
    with pytest.raises(WorldError, match=r"rank 1 of run B on 2 processes met another run .*: run A on 2 processes;"):
        meet("run B", environment(1, port), SOON)
    with pytest.raises(WorldError, match=r"rank 1 of run A on 4 processes met another run .*: run A on 2 processes;"):
        meet("run A", environment(1, port, world_size=4), SOON)
    with pytest.raises(WorldError, match=rf"cannot meet at .*localhost:{port}: another program uses that port"):
        meet("run B", environment(0, port), SOON)


def test_nobody_there_is_one_sentence() -> None:
    with socket.socket() as silent:
        silent.bind(("localhost", 0))  # bound and not listening: nobody else gets it, nobody answers
        port = silent.getsockname()[1]
        with pytest.raises(WorldError, match=rf"rank 1 met nobody at .*localhost:{port} .*look whether rank 0"):
            meet("run A", environment(1, port), timedelta(seconds=1))


def test_half_an_environment_is_one_sentence() -> None:
    with pytest.raises(WorldError, match="RANK is set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"):
        meet("run A", {"RANK": "1"})
