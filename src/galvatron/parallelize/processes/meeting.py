"""Where the ranks of a joined world meet, each of them sure that the others are of its own run.

Takes the launcher's environment and a run's name; gives a store for ``init_world``.  Ranks of two runs that were given
one address would otherwise count as each other's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import DistError
from torch.distributed.rendezvous import rendezvous

from galvatron.core.errors import WorldError
from galvatron.internals import PrefixStore, Store, TCPStore

MEETING_TIME = timedelta(minutes=10)
"""How long ranks wait for rank 0: nodes of one job may start minutes apart."""
_KEY = "galvatron/run"


def meet(run: str, environment: Mapping[str, str] = os.environ, timeout: timedelta = MEETING_TIME) -> Store:
    """The store of the world that ``environment`` describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Args:
        run: what this rank belongs to, in words for people; equal on all ranks of a run and on no other.
        environment: torchrun's variables.
        timeout: how long to wait for rank 0.

    Raises:
        WorldError: the port is taken, rank 0 does not answer, or rank 0 is of another run.
    """
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise WorldError(f"RANK is set but {', '.join(missing)} not; let torchrun or srun set all, or unset RANK")
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    mine = f"{run} on {world_size} processes"
    place = f"MASTER_ADDR:MASTER_PORT={environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    try:
        store = _store(environment, timeout)
        if rank == 0:
            store.set(_KEY, mine)
        theirs = store.get(_KEY).decode()
    except DistError as error:
        raise WorldError(_unreachable(rank, place, error)) from None
    if theirs != mine:
        raise WorldError(
            f"rank {rank} of {mine} met another run at {place}: {theirs}; give each run a MASTER_PORT of its own "
            "(under srun leave it unset), and start all ranks of a run with one command"
        )
    return PrefixStore(mine, store)


def _store(environment: Mapping[str, str], timeout: timedelta) -> Store:
    """The agent's store under torchrun, else rank 0's own."""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        return store
    return TCPStore(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        is_master=environment["RANK"] == "0",
        timeout=timeout,
        wait_for_workers=False,  # ranks of another run must not be counted
    )


def _unreachable(rank: int, place: str, error: Exception) -> str:
    if rank == 0 and "EADDRINUSE" in str(error):
        return f"the processes cannot meet at {place}: another program uses that port; set MASTER_PORT to a free one"
    reason = str(error).split("\n", 1)[0]
    return f"rank {rank} met nobody at {place} ({reason}); look whether rank 0 has started and failed there"
