"""Agreement between ranks: one rank acts, all hear the result; one rank fails, all raise.

Works without an initialised process group too: then there is one rank.  Where one rank acts the others wait at the
world's store, not in a collective: as long as rank 0 lives it may take hours, and no process group times out.
"""

from __future__ import annotations

import itertools
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from galvatron.core.errors import WorldError
from galvatron.internals import Store, default_store

T = TypeVar("T")

BEAT_S = 5.0
SILENCE_S = 120.0
"""How long rank 0 may be silent, busy or not, before the other ranks take it for lost."""
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.25
"""Between two looks at the store, of which the first come fast, for short actions."""


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
    """Run ``action`` on rank 0, however long it takes; its (picklable) result, or its exception, on every rank.

    Raises:
        WorldError: rank 0 is gone.
    """
    if world_size() == 1:
        return action()
    store = default_store()
    call = f"on-rank-zero/{store.add(f'on-rank-zero/calls/{rank()}', 1)}"
    if rank() == 0:
        with _heartbeat(store, f"{call}/beat"):
            outcome = _outcome(action)
        store.set(call, pickle.dumps(outcome))  # type: ignore[arg-type]  # bytes are taken as they are
    else:
        outcome = _await_outcome(store, call)
        if store.add(f"{call}/heard", 1) == world_size() - 1:
            for key in (call, f"{call}/beat", f"{call}/heard"):
                store.delete_key(key)
    result, failure = outcome
    if failure is not None:
        raise failure
    return cast(T, result)


def _outcome(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


@contextmanager
def _heartbeat(store: Store, key: str) -> Iterator[None]:
    """Count at ``key`` while the block runs, for those who wait to see."""
    over = threading.Event()

    def beat() -> None:
        for number in itertools.count():
            store.set(key, str(number))
            if over.wait(BEAT_S):
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _await_outcome(store: Store, call: str) -> tuple[Any, Exception | None]:
    heard, beat, pause = time.monotonic(), b"", SHORTEST_PAUSE_S
    try:
        while not store.check([call]):
            if store.check([f"{call}/beat"]) and (now := store.get(f"{call}/beat")) != beat:
                heard, beat = time.monotonic(), now
            if time.monotonic() - heard > SILENCE_S:
                raise WorldError(f"rank 0 has not been heard of for {SILENCE_S:g} s; look whether its node lives")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        return cast("tuple[Any, Exception | None]", pickle.loads(store.get(call)))
    except dist.DistNetworkError as error:
        reason = str(error).split("\n", 1)[0]
        raise WorldError(f"rank 0 is gone ({reason}); look for its message and start again") from None


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


def all_max(values: Sequence[float], *, beside: Sequence[torch.Tensor] = ()) -> list[float]:
    """The elementwise maximum of ``values`` over all ranks, in float64; then the scalars ``beside``, as they are here.

    The host waits once for all of them.
    """
    numbers = torch.tensor(values, dtype=torch.float64, device=communication_device())
    if world_size() > 1:
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    if beside:
        scalars = torch.stack(list(beside)).double()
        numbers = torch.cat([numbers.to(scalars.device), scalars])
    return cast("list[float]", numbers.tolist())
