"""Where images and sounds come from: folders, records with paths or bytes, webdataset tars; with a class or a text.

Takes a path; gives media in a fixed order, read when they are asked for.  Decodes nothing.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from galvatron.core.errors import DataError
from galvatron.core.words import shown

from ..sources import kind_of, open_text, records_of
from ..text import Read, Spans, said_in
from .classes import Class, class_in

TEXTS = (".jsonl", ".csv")
"""Of records, packed by gzip or not."""


@dataclass(frozen=True, slots=True)
class Medium:
    """An image's or a sound's bytes, where it stands, and what is known of it."""

    NAME: ClassVar[str]
    ENDINGS: ClassVar[tuple[str, ...]]
    """Of its files."""

    where: str
    read: Callable[[], bytes]
    label: Class | None = None
    text: str | None = None
    learnt: Spans | None = None
    """From which to before which character of the text a model shall learn; None: all, and that it ends there."""

    @classmethod
    def find(cls, source: Path, fields: Fields | None = None) -> list[Self]:
        """All of ``source``, sorted by file: a file of records or a tar, or a directory of these, or of plain files.

        In a directory of plain files a class is a folder, and a text a ``.txt`` beside its medium.  A tar has files of
        one name and several endings for each sample, as webdataset writes them: a medium, ``.cls`` or ``.txt``, or the
        fields of a ``.json``.

        Raises:
            DataError: there are none, or a record is not what ``fields`` say.
        """
        fields = fields or Fields()
        files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
        packed = [path for path in files if path.suffix in _READERS or kind_of(path) in TEXTS]
        found: list[Self] = []
        for path in packed:
            found += _READERS[path.suffix if path.suffix in _READERS else kind_of(path)](path, fields, cls)
        if not packed:
            found = [_of_folder(path, source, fields, cls) for path in files if path.suffix.lower() in cls.ENDINGS]
        if not found:
            raise DataError(
                f"{source} has no {cls.NAME}s; give a directory of them, one folder a class or a .txt beside each, or "
                f".jsonl, .csv, .parquet or .tar"
            )
        return found


M = TypeVar("M", bound=Medium)


@dataclass(frozen=True, slots=True)
class Fields:
    """What records call a medium (a path from beside them; in parquet its bytes), its class and its text.

    ``read``: what a record says beside a medium that has a text; None where media have classes.
    """

    medium: str = "image"
    label: str = "label"
    text: str = "text"
    read: Read | None = None


def _of_folder(path: Path, source: Path, fields: Fields, kind: type[M]) -> M:
    if fields.read is not None:
        with open_text(path.with_suffix(".txt")) as text:
            return _made(kind, str(path), path.read_bytes, {fields.text: text.read().strip()}, fields)
    inside = path.relative_to(source).parts[:-1] if path != source else ()
    return kind(str(path), path.read_bytes, inside[0] if inside else None)


def _of_records(path: Path, fields: Fields, kind: type[M]) -> Iterator[M]:
    for where, record in records_of(path):
        if isinstance(record, str):
            raise DataError(f"{where} {record}")
        medium = record.get(fields.medium)
        if not isinstance(medium, str) or not (path.parent / medium).is_file():
            beside = f"a path from {path.parent}"
            raise DataError(f"{where} must have {beside} in field {fields.medium!r}, got {shown(medium)}; mend it")
        yield _made(kind, where, (path.parent / medium).read_bytes, record, fields)


def _of_parquet(path: Path, fields: Fields, kind: type[M]) -> Iterator[M]:
    """Media stay in the file until they are asked for."""
    file = _parquet(path)
    others = [name for name in file.schema_arrow.names if name != fields.medium]
    if fields.medium not in file.schema_arrow.names:
        raise DataError(f"{path} has no column {fields.medium!r}, only {shown(others)}; say which one has {kind.NAME}s")
    number = 0
    for group in range(file.num_row_groups):
        rows = file.read_row_group(group, columns=others).to_pylist()
        for row, record in enumerate(rows or [{}] * file.metadata.row_group(group).num_rows):
            where, read = f"{path}, row {number},", partial(_cell, path, group, row, fields.medium)
            yield _made(kind, where, read, record, fields)
            number += 1


def _parquet(path: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}; mend or remove it") from None


@lru_cache(maxsize=2)  # neighbours are often asked for together
def _column(path: Path, group: int, name: str) -> Any:
    return _parquet(path).read_row_group(group, columns=[name]).column(0)


def _cell(path: Path, group: int, row: int, name: str) -> bytes:
    cell = _column(path, group, name)[row].as_py()
    medium = cell.get("bytes") if isinstance(cell, dict) else cell  # as Hugging Face's datasets write it, or plain
    if not isinstance(medium, bytes):
        raise DataError(f"column {name!r} must have bytes, got {shown(medium)}")
    return medium


def _made(kind: type[M], where: str, read: Callable[[], bytes], record: dict[str, Any], fields: Fields) -> M:
    if fields.read is None:
        return kind(where, read, class_in(record, fields.label, where))
    text, learnt = said_in(record, fields.read, where)
    return kind(where, read, text=text, learnt=learnt)


def _of_tar(path: Path, fields: Fields, kind: type[M]) -> Iterator[M]:
    try:
        with tarfile.open(path, "r:") as archive:  # unpacked: its parts are read where they stand
            members = [member for member in archive if member.isfile()]
            samples: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in members:
                folder, _, name = member.name.rpartition("/")
                key, _, ending = name.partition(".")
                samples.setdefault(f"{folder}/{key}", {})[f".{ending.lower()}"] = member
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path} is no plain tar ({error}); unpack it or make it anew") from None
    for key, parts in samples.items():
        where = f"{path}:{key.lstrip('/')}"
        medium = next((parts[ending] for ending in kind.ENDINGS if ending in parts), None)
        if medium is None:
            raise DataError(f"{where} has no {kind.NAME} among {', '.join(sorted(parts))}; mend or remove it")
        yield _made(kind, where, _part(path, medium), _said(path, parts, fields, where), fields)


def _said(path: Path, parts: dict[str, tarfile.TarInfo], fields: Fields, where: str) -> dict[str, Any]:
    """The fields of a sample."""
    try:
        record = json.loads(_part(path, parts[".json"])()) if ".json" in parts else {}
        if ".cls" in parts:
            record[fields.label] = int(_part(path, parts[".cls"])())
        if ".txt" in parts:
            record[fields.text] = _part(path, parts[".txt"])().decode()
    except (ValueError, TypeError) as error:
        raise DataError(f"{where} has a class or fields that cannot be read ({error}); mend it") from None
    return record if isinstance(record, dict) else {}


def _part(path: Path, member: tarfile.TarInfo) -> Callable[[], bytes]:
    return partial(_read_at, path, member.offset_data, member.size)


def _read_at(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


_READERS: dict[str, Callable[[Path, Fields, Any], Iterator[Any]]] = {
    ".tar": _of_tar,
    ".parquet": _of_parquet,
    **dict.fromkeys(TEXTS, _of_records),
}
