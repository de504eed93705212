"""One command at a time in a directory; what holds it may end in any way, on any host."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from galvatron.cli import lock
from galvatron.cli.lock import Holder, locked
from galvatron.core.errors import ConfigError

FORK = multiprocessing.get_context("fork")


def _hold(directory: Path, connection: Connection, with_rank: bool) -> None:
    with locked(directory):
        if with_rank and os.fork() == 0:
            time.sleep(1.5)  # an orphan that takes a while to end
            os._exit(0)
        connection.send(os.getpid())
        time.sleep(60)


def hold_and_kill(directory: Path, *, with_rank: bool = False) -> int:
    """Hold ``directory`` in another process, which is then killed; its id."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_hold, args=(directory, theirs, with_rank))
    process.start()
    pid = ours.recv()
    with (
        pytest.raises(ConfigError, match=rf"is in use by process {pid} on \S+ since 20\d\d-.*; wait for it"),
        locked(directory),
    ):
        pass
    os.kill(pid, signal.SIGKILL)
    process.join()
    return int(pid)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    monkeypatch.setattr(lock, "WATCH_S", 0.5)


def test_a_second_command_is_refused_and_a_kill_leaves_no_stale_lock(tmp_path: Path) -> None:
    hold_and_kill(tmp_path / "run")
    with locked(tmp_path / "run"):
        assert Holder.model_validate_json((tmp_path / "run" / lock.FILE).read_text()).pid == os.getpid()
    assert not (tmp_path / "run" / lock.FILE).exists()


def test_the_orphans_of_a_killed_command_are_waited_for(tmp_path: Path) -> None:
    hold_and_kill(tmp_path, with_rank=True)
    start = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - start > 0.5


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "exported" / ".step-000004.77.0123abcd").mkdir(parents=True)
    for name in (".plan.json.4711.d9090492", ".hidden", "plan.json"):
        (tmp_path / name).touch()
    with locked(tmp_path):
        pass
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"exported", ".hidden", "plan.json"}


def test_a_directory_that_was_not_there_and_stays_empty_goes_again(tmp_path: Path) -> None:
    with locked(tmp_path / "runs" / "new"):
        pass
    assert not (tmp_path / "runs").exists()
    with locked(tmp_path / "filled"):
        (tmp_path / "filled" / "plan.json").touch()
    assert [path.name for path in (tmp_path / "filled").iterdir()] == ["plan.json"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("has_flock", [True, False])
def test_a_holder_beyond_the_lock_s_reach_is_heard_by_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_flock: bool
) -> None:
    """A disk whose locks end at the host, or that has none: the other command lives, then is killed."""
    monkeypatch.setattr(lock, "_flock", lambda descriptor: has_flock)
    if has_flock:
        monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    with locked(tmp_path):
        monkeypatch.setattr("socket.gethostname", lambda: "here")
        with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on"), locked(tmp_path):
            pass
    killed = Holder(host="elsewhere", pid=1, since="2026-11-26T12:00:00+00:00")
    (tmp_path / lock.FILE).write_text(killed.model_dump_json())
    with locked(tmp_path):
        pass
