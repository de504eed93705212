"""Local processes: results, and how each kind of failure comes back."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from galvatron.cli.launch import processes
from galvatron.cli.workers import WorkerCrash
from galvatron.core.errors import PlanError
from galvatron.parallelize.processes.world import World


def _sum_of_ranks(world: World, argument: int) -> float:
    total = torch.tensor(float(world.rank + argument))
    dist.all_reduce(total)
    return float(total)


def _rank_one_fails(world: World, how: str) -> None:
    if world.rank == 1:
        if how == "mistake":
            raise PlanError("tp=3 must divide num_heads=4; choose 1, 2 or 4")
        if how == "bug":
            raise RuntimeError("a bug of ours")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _writes_and_reports_threads(world: World, folder: str) -> int:
    (Path(folder) / f"rank-{world.rank}").touch()
    print(f"rank {world.rank} speaks", flush=True)
    return torch.get_num_threads()


def test_every_rank_works_and_rank_zero_answers() -> None:
    with processes(3, "cpu") as ranks:
        assert ranks.run(_sum_of_ranks, 1) == 6.0
        assert ranks.run(_sum_of_ranks, 0) == 3.0


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("mistake", PlanError, r"^tp=3 must divide num_heads=4; choose 1, 2 or 4$"),
        ("bug", WorkerCrash, "rank 1 failed:\n(.|\n)*a bug of ours"),
        ("kill", WorkerCrash, "rank 1 was killed by SIGKILL"),
    ],
)
def test_the_cause_comes_back(how: str, error: type[Exception], message: str) -> None:
    with processes(2, "cpu") as ranks, pytest.raises(error, match=message):
        ranks.run(_rank_one_fails, how)


def test_only_rank_zero_is_heard_and_signal_handlers_return(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = signal.getsignal(signal.SIGTERM)
    with processes(2, "cpu") as ranks:
        assert ranks.run(_writes_and_reports_threads, str(tmp_path)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"rank-0", "rank-1"}
    assert capfd.readouterr().out == "rank 0 speaks\n"
    assert signal.getsignal(signal.SIGTERM) is before
