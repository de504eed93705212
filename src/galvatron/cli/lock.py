"""One command at a time in a run directory, on whatever disk it lies.

Takes a directory.  The lock is the system's (flock), so it ends with the processes that hold it, however they end, and
is never stale; forked ranks hold it with their parent.  Disks whose locks do not reach other hosts have the holder's
heartbeat beside it: the lock file's change time.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from galvatron.core.errors import ConfigError
from galvatron.core.files import remove_unfinished
from galvatron.core.records import Record

FILE = "run.lock"
BEAT_S = 2.0
WATCH_S = 4 * BEAT_S
"""How long a holder on another host, which left without releasing, is watched before it is taken for gone."""
ORPHANS_S = 10.0
"""How long the ranks of a killed command on this host, which end by themselves, are waited for."""


class Holder(Record):
    """Who holds a lock: written into it for people, and for hosts that its lock does not reach."""

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold ``directory``, made if need be and cleared of what killed writers left; empty, it is removed afterwards.

    Raises:
        ConfigError: another command holds it.
    """
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE
    descriptor = _acquire(path)
    over = threading.Event()
    beats = threading.Thread(target=_beat, args=(descriptor, over), name="run-lock", daemon=True)
    beats.start()
    try:
        for folder in (directory, *(path for path in directory.iterdir() if path.is_dir())):
            remove_unfinished(folder)
        yield
    finally:
        over.set()
        beats.join()
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # until one that holds something
            for folder in made:
                folder.rmdir()


def _beat(descriptor: int, over: threading.Event) -> None:
    while not over.wait(BEAT_S):
        with suppress(OSError):  # a disk that is away for a while
            os.utime(descriptor)


def _acquire(path: Path) -> int:
    deadline = time.monotonic() + ORPHANS_S
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            reaches_all = _flock(descriptor)
            holder = _holder(path)
            if holder is not None and (holder.host != socket.gethostname() or not reaches_all) and _is_beating(path):
                raise BlockingIOError
            if not _is_same(descriptor, path):
                continue  # released, and removed, between our two steps
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            text = Holder(host=socket.gethostname(), pid=os.getpid(), since=now).model_dump_json()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(), 0)
            held, descriptor = descriptor, -1
            return held
        except BlockingIOError:
            holder = _holder(path)
            if holder is None or not _are_orphans(holder) or time.monotonic() > deadline:
                raise ConfigError(
                    f"{path.parent} is in use by {holder or 'another command'}; wait for it, end it, or give another "
                    "--run-dir"
                ) from None
            time.sleep(0.1)
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def _flock(descriptor: int) -> bool:
    """Take the system's lock; False on a disk that has none.  Raises BlockingIOError if it is taken."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as failure:
        if failure.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            return False
        if failure.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError from None
        raise
    return True


def _holder(path: Path) -> Holder | None:
    """Who wrote the lock file; None where nobody did, or is about to."""
    try:
        return Holder.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return None


def _is_beating(path: Path) -> bool:
    """Whether the file is touched by someone, as seen by opening it anew, which asks the server."""
    first = _changed(path)
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(BEAT_S / 4)
        if _changed(path) != first:
            return True
    return False


def _changed(path: Path) -> int:
    with suppress(OSError), path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns
    return 0


def _is_same(descriptor: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _are_orphans(holder: Holder) -> bool:
    """Whether what holds the lock are the ranks of a command of this host that was killed."""
    if holder.host != socket.gethostname():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
