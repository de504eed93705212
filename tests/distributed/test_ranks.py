"""One rank acts, the others hear of it, however long it takes."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from galvatron.core.errors import DataError
from galvatron.parallelize.processes import ranks
from galvatron.testing.pool import Pool, WorkerError


def _act(seconds: float) -> int:
    time.sleep(seconds)
    return dist.get_rank() + 7


def _slow_action(seconds: float) -> list[int]:
    """In a process group that gives up after half a second: two calls, the first slow, and the keys left."""
    group = dist.new_group(timeout=timedelta(seconds=0.5))
    ranks.BEAT_S = 0.1
    ranks.SILENCE_S = seconds / 2  # shorter than the action: it is the beats that are waited for
    try:
        first = ranks.on_rank_zero(lambda: _act(seconds))
    finally:
        ranks.BEAT_S, ranks.SILENCE_S = 5.0, 120.0
    second = ranks.on_rank_zero(lambda: _act(0))
    dist.barrier(group)
    return [first, second]


def _silent_action() -> None:
    ranks.BEAT_S, ranks.SILENCE_S = 60.0, 2.0
    try:
        ranks.on_rank_zero(lambda: _act(5))
    finally:
        ranks.BEAT_S, ranks.SILENCE_S = 5.0, 120.0


def _failing_action() -> str:
    def fail() -> None:
        raise DataError("no text; give some")

    with pytest.raises(DataError) as error:
        ranks.on_rank_zero(fail)
    return str(error.value)


def test_a_slow_action_outlasts_any_timeout(pool: Pool) -> None:
    assert pool.run(_slow_action, 3.0, world_size=3) == [[7, 7]] * 3


def test_a_failure_is_every_rank_s(pool: Pool) -> None:
    assert pool.run(_failing_action, world_size=2) == ["no text; give some"] * 2


def test_a_silent_rank_zero_is_given_up(pool: Pool) -> None:
    with pytest.raises(WorkerError, match="WorldError: rank 0 has not been heard of for 2 s"):
        pool.run(_silent_action, world_size=2)
