"""Outputs: refused before the work begins, whole or not at all, and kept where they cannot be written."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from galvatron.core.errors import OutputError
from galvatron.core.files import check_folder, check_output, new_folder, write_atomic, write_output


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 KiB without a free byte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("only root mounts a disk")
    try:
        (disk / "ballast").write_bytes(bytes(16 << 10))
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_new_file_has_the_permissions_that_its_owner_gives_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "new" / "plan.json", "{}")
    finally:
        os.umask(before)
    assert _mode(tmp_path / "new/plan.json") == 0o640
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plan.json"]


def test_an_old_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    path.chmod(0o604)
    write_atomic(path, "new")
    assert (path.read_text(), _mode(path)) == ("new", 0o604)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_an_old_file_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    os.chown(path, 1234, 5678)
    write_atomic(path, "new")
    assert (path.read_text(), path.stat().st_uid, path.stat().st_gid) == ("new", 1234, 5678)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name, target in (("link", "elsewhere/plan.json"), ("dangling", "elsewhere/new/plan.json")):
        (tmp_path / name).symlink_to(target)
        write_atomic(tmp_path / name, "text")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target).read_text() == "text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "elsewhere", "link"]


def test_a_device_stays_a_device() -> None:
    before = os.stat("/dev/null")
    check_output("/dev/null")
    write_output("/dev/null", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert os.stat("/dev/null").st_ino == before.st_ino


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_output(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{}")
    (tmp_path / "same.json").symlink_to("model.json")
    (tmp_path / "loop").symlink_to("loop")
    for path, says in (
        ("", "must name a file to write but . is a folder"),
        (tmp_path, "is a folder; name a file in it"),
        (tmp_path / "same.json", "must not replace .*model.json, which is read here"),
        (tmp_path / "model.json/plan.json", "because .*model.json is a file|not a directory"),
        (tmp_path / ("n" * 300), "file name too long"),
        (tmp_path / "loop", "too many levels of symbolic links"),
    ):
        with pytest.raises(OutputError, match=says):
            check_output(path, tmp_path / "model.json", "llama2-7b")
    assert {path.name for path in tmp_path.iterdir()} == {"model.json", "same.json", "loop"}


def test_a_folder_to_write_into(tmp_path: Path) -> None:
    check_folder(tmp_path / "new" / "deep", new=True)
    check_folder(tmp_path, new=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="holds files; give another"):
        check_folder(tmp_path, new=True)
    with pytest.raises(OutputError, match=r"--run-dir must be a folder .* is a file"):
        check_folder(tmp_path / "file", "--run-dir")
    with pytest.raises(OutputError, match=r"because .*file is a file|not a directory"):
        check_folder(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_what_may_not_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("")
    (tmp_path / "plan.json").chmod(0o444)
    with pytest.raises(OutputError, match="is read-only"):
        check_output(tmp_path / "plan.json")
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="may not be"):
        check_output(tmp_path / "other.json")
    tmp_path.chmod(0o755)


def test_a_full_disk_is_seen_before_the_work(full_disk: Path) -> None:
    with pytest.raises(OutputError, match="its disk is full; free some space"):
        check_output(full_disk / "plan.json")
    with pytest.raises(OutputError, match="its disk is full"):
        check_folder(full_disk / "runs" / "first")


def test_what_a_full_disk_refuses_is_kept(full_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(full_disk))
    monkeypatch.chdir(tmp_path)
    (full_disk / "plan.json").write_text("")
    with pytest.raises(OutputError, match=r"no space left on device.*kept as .*-plan\.json, move it") as refusal:
        write_output(full_disk / "plan.json", "result\n")
    (kept,) = tmp_path.glob("galvatron-*-plan.json")
    assert str(kept) in str(refusal.value)
    assert kept.read_text() == "result\n"
    assert {path.name for path in full_disk.iterdir()} == {"ballast", "plan.json"}


def test_what_no_disk_takes_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("tempfile.gettempdir", "pathlib.Path.cwd", "pathlib.Path.home"):
        monkeypatch.setattr(place, lambda: "/proc/nowhere")
    with pytest.raises(OutputError, match=r"/dev/full cannot be written .*printed above"):
        write_output("/dev/full", "result\n")
    assert capsys.readouterr().out == "result\n"


def _half_filled(path: Path) -> None:
    with new_folder(path) as folder:
        (folder / "part").write_text("")
        raise KeyError


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        _half_filled(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as folder:
        (folder / "part").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part"]
