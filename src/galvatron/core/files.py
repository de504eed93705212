"""Files that people asked for: looked at before the work begins, written whole or not at all, and never lost.

Takes paths and texts.  A link stays a link and what it points to is replaced; an existing file keeps its permissions
and its owner; what is no file (``/dev/null``, a pipe) is written into, not replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import OutputError

_UNFINISHED = re.compile(r"\..+\.\d+\.[0-9a-f]{8}")  # .NAME.PROCESS.RANDOM, as below
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (*_NO_ROOM, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def check_output(path: str | Path, *inputs: str | Path, option: str = "--out") -> None:
    """Refuse what could not be written in the end.  Changes nothing; ``option`` names the path in messages.

    Raises:
        OutputError: ``path`` is a folder, is one of ``inputs``, lies under a file, may not be written, or its disk is
            full.
    """
    target = Path(path)
    with _refusals(target, option):
        with contextlib.suppress(FileNotFoundError):
            target.stat()  # Path.exists says no to links in a circle
        if target.is_dir():
            raise OutputError(f"{option} must name a file to write but {target} is a folder; name a file in it")
        for given in inputs:
            if target.exists() and Path(given).exists() and target.samefile(given):
                raise OutputError(f"{option} must not replace {given}, which is read here; give another file")
        if target.exists() and not os.access(target, os.W_OK):
            raise OutputError(f"{option} must name a file that may be written but {target} is read-only; give another")
        if not is_special(target):
            _check_room(Path(os.path.realpath(target)).parent, target, option)


def check_folder(path: str | Path, option: str = "--out", *, new: bool = False) -> None:
    """The same for a folder that files shall be written into; ``new``: it must be empty or not exist yet.

    Raises:
        OutputError: ``path`` is a file, lies under one, holds something though it must not, may not be written, or is
            on a full disk.
    """
    folder = Path(path)
    with _refusals(folder, option):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{option} must be a folder to write files into but {folder} is a file; give another one")
        if new and folder.is_dir() and any(folder.iterdir()):
            raise OutputError(f"{option} must be a new or empty folder but {folder} holds files; give another one")
        _check_room(folder, folder, option)


def is_special(path: str | Path) -> bool:
    """Whether ``path`` is written into rather than replaced: a device, a pipe, standard output."""
    if os.path.abspath(path).startswith(("/dev/", "/proc/")):  # /dev/stdout may be a regular file
        return os.path.exists(path)
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def write_output(path: str | Path, text: str) -> None:
    """``write_atomic`` of what took long to make: where it cannot be written it is kept, and the error says where.

    Raises:
        OutputError: ``text`` is in another folder, or printed, because ``path`` cannot be written.
    """
    try:
        write_atomic(path, text)
    except OSError as failure:
        raise OutputError(f"{path} cannot be written ({_reason(failure)}); {_kept(Path(path), text)}") from None


def write_atomic(path: str | Path, text: str) -> None:
    """Write ``text`` beside ``path``, then rename over it: readers see the old text or the new, never a part.

    Parent folders are made; a new file has the permissions that its owner gives new files.  Raises OSError.
    """
    if is_special(path):
        with open(path, "ab", buffering=0) as file:
            file.write(text.encode())
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:200]}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            _like(temporary, target.stat())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what ``write_atomic`` and ``new_folder`` left in ``folder`` when they were killed; nobody may write."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder beside ``path`` to fill, which takes its place at the end; nothing is left of it after an error.

    ``path`` does not exist or is empty (``check_folder``).  Raises OutputError where the disk refuses.
    """
    folder = Path(os.path.realpath(path))
    temporary = folder.with_name(f".{folder.name[:200]}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(folder)
    except OSError as failure:
        raise OutputError(
            f"{path} cannot be written ({_reason(failure)}); give another path or free some space"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def as_output_error(failure: OSError) -> OutputError | None:
    """What to say of a disk that refused a write somewhere in a long run; None where that is not what went wrong."""
    if failure.errno not in _REFUSED:
        return None
    name = failure.filename or "a file"
    remedy = "free some space" if failure.errno in _NO_ROOM else "give a path that you may write"
    return OutputError(f"{name} cannot be written ({_reason(failure)}); {remedy} and start again")


def _like(path: Path, model: os.stat_result) -> None:
    with contextlib.suppress(PermissionError):  # only root gives files away
        if (path.stat().st_uid, path.stat().st_gid) != (model.st_uid, model.st_gid):
            os.chown(path, model.st_uid, model.st_gid)
    path.chmod(stat.S_IMODE(model.st_mode))


@contextlib.contextmanager
def _refusals(path: Path, option: str) -> Iterator[None]:
    """What the system says of a path that cannot even be looked at, as one sentence."""
    try:
        yield
    except OSError as failure:
        raise OutputError(f"{option} {path} cannot be written ({_reason(failure)}); give another path") from None


def _check_room(folder: Path, path: Path, option: str) -> None:
    """Whether files could be made in ``folder``, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"{option} {path} cannot be written because {folder} is a file; give another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(
            f"{option} {path} cannot be written because the folder {folder} may not be; give another path"
        )
    disk = os.statvfs(folder)
    if (disk.f_blocks and not disk.f_bavail) or (disk.f_files and not disk.f_favail):
        raise OutputError(
            f"{option} {path} cannot be written because its disk is full; free some space or give another"
        )


def _kept(path: Path, text: str) -> str:
    """Put ``text`` wherever it can be kept; says where."""
    for place in (tempfile.gettempdir, Path.cwd, Path.home):
        with contextlib.suppress(OSError, RuntimeError):  # no home, no folder for temporary files
            kept = Path(place()) / f"galvatron-{secrets.token_hex(4)}-{path.name}"
            write_atomic(kept, text)
            return f"it was kept as {kept}, move it where it belongs"
    sys.stdout.write(text)
    return "it is printed above, keep it from there"


def _reason(failure: OSError) -> str:
    return (failure.strerror or str(failure)).lower()
