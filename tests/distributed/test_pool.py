from __future__ import annotations

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from galvatron.testing.pool import Pool, WorkerError


def _sum_of_ranks(scale: int) -> tuple[int, int, float]:
    total = torch.tensor([float(dist.get_rank() * scale)])
    dist.all_reduce(total)
    return dist.get_rank(), int(os.environ["WORLD_SIZE"]), total.item()


def _fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} has had enough")
    dist.barrier()


def _die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def _process_id() -> int:
    return os.getpid()


def _destroy() -> bool:
    dist.destroy_process_group()
    return dist.is_initialized()


def _exit_later() -> None:
    threading.Timer(0.05, os._exit, args=(0,)).start()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_in_rank_order_from_a_world_of_the_asked_size(pool: Pool, world_size: int) -> None:
    expected = 10.0 * sum(range(world_size))
    assert pool.run(_sum_of_ranks, 10, world_size=world_size) == [(r, world_size, expected) for r in range(world_size)]


def test_workers_are_reused(pool: Pool) -> None:
    assert pool.run(_process_id, world_size=2) == pool.run(_process_id, world_size=4)[:2]


def test_a_function_may_destroy_the_world_itself(pool: Pool) -> None:
    assert pool.run(_destroy, world_size=2) == [False, False]


def test_a_failing_rank_is_reported_with_its_traceback_and_the_pool_lives_on(pool: Pool) -> None:
    with pytest.raises(WorkerError, match="rank 1 has had enough") as caught:
        pool.run(_fail_on, 1, world_size=2)
    assert next(iter(caught.value.failures)) == 1
    assert "_fail_on" in caught.value.failures[1]
    assert len(pool.run(_process_id, world_size=2)) == 2


def test_a_dead_rank_is_reported(pool: Pool) -> None:
    with pytest.raises(WorkerError, match="ended without an answer"):
        pool.run(_die_on, 1, world_size=2)


def test_a_hanging_function_ends_at_its_timeout(pool: Pool) -> None:
    with pytest.raises(WorkerError, match=r"no answer within 0\.2 s"):
        pool.run(_sleep, 60.0, world_size=2, timeout_s=0.2)


def test_what_pickle_cannot_name_is_refused_before_anything_is_sent(pool: Pool) -> None:
    with pytest.raises((AttributeError, TypeError), match=r"pickle|local object"):
        pool.run(lambda: None, world_size=2)
    assert len(pool.run(_process_id, world_size=2)) == 2


def test_workers_that_died_between_calls_are_replaced(pool: Pool) -> None:
    pool.run(_exit_later, world_size=2)
    time.sleep(0.5)
    assert len(pool.run(_process_id, world_size=2)) == 2
