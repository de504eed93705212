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
from ..text import Read, Skipped, Spans, good
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
    more: tuple[Callable[[], bytes], ...] = ()
    """How further media of the same text are read."""

    @classmethod
    def find(cls, source: Path, fields: Fields | None = None, skipped: Skipped | None = None) -> list[Self]:
        """All of ``source``, sorted by file: a file of records or a tar, or a directory of these, or of plain files.

        In a directory of plain files a class is a folder, and a text a ``.txt`` beside its medium.  A tar has files of
        one name and several endings for each sample, as webdataset writes them: a medium, ``.cls`` or ``.txt``, or the
        fields of a ``.json``.

        ``skipped`` is told of the records that it allows to leave out.

        Raises:
            DataError: there are none, or a record is not what ``fields`` say.
        """
        fields, skipped = fields or Fields(), skipped or Skipped()
        files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
        packed = [path for path in files if path.suffix in _READERS or kind_of(path) in TEXTS]
        found: list[Self] = []
        made = partial(_made, cls, fields)
        for path in packed:
            held = _READERS[path.suffix if path.suffix in _READERS else kind_of(path)](path, fields, cls)
            found += good(held, made, skipped)
        if not packed:
            loose = (_of_file(path, source, fields) for path in files if path.suffix.lower() in cls.ENDINGS)
            found += good(loose, made, skipped)
        if not found:
            raise DataError(
                f"{source} has no {cls.NAME}s{skipped.told()}; give a directory of them, one folder a class or a .txt "
                "beside each, or .jsonl, .csv, .parquet or .tar"
            )
        return found


M = TypeVar("M", bound=Medium)


@dataclass(frozen=True, slots=True)
class Fields:
    """What records call a medium (a path from beside them; in parquet its bytes), its class and its text.

    ``read``: what a record says beside a medium that has a text; None where media have classes.  ``several``: whether
    a record may have a list of paths.
    """

    medium: str = "image"
    label: str = "label"
    text: str = "text"
    read: Read | None = None
    several: bool = False


Held = tuple[tuple[Callable[[], bytes], ...], dict[str, Any]]
"""How the bytes of a record's media are read, of one or more, and the record beside them."""
HeldAt = tuple[str, Held | str]
"""Where it stands, and its media; a text where none can be had: what is wrong."""


def _made(kind: type[M], fields: Fields, where: str, held: Held) -> M:
    """Raises BadRecord."""
    (read, *more), record = held
    if fields.read is None:
        return kind(where, read, class_in(record, fields.label))
    text, learnt = fields.read(record)
    return kind(where, read, text=text, learnt=learnt, more=tuple(more))


def _of_file(path: Path, source: Path, fields: Fields) -> HeldAt:
    """A plain file, in the folder of its class or beside its text."""
    inside, beside = path.relative_to(source).parts[:-1] if path != source else (), path.with_suffix(".txt")
    if fields.read is None:
        said = (
            {fields.label: inside[0]} if inside else f"must be in the folder of its class, below {source}; put it there"
        )
    elif beside.is_file():
        with open_text(beside) as text:
            said = {fields.text: text.read().strip()}
    else:
        said = f"must have its text beside it, in {beside.name}; write one or remove it"
    return str(path), said if isinstance(said, str) else ((path.read_bytes,), said)


def _of_records(path: Path, fields: Fields, kind: type[Medium]) -> Iterator[HeldAt]:
    for where, record in records_of(path):
        yield where, record if isinstance(record, str) else _at_path(path.parent, record, fields)


def _at_path(folder: Path, record: dict[str, Any], fields: Fields) -> Held | str:
    named = record.get(fields.medium)
    media: list[Any] = named if fields.several and isinstance(named, list) and named else [named]
    for medium in media:
        if not isinstance(medium, str) or not (folder / medium).is_file():
            return f"must have a path from {folder} in field {fields.medium!r}, got {shown(medium)}; mend it"
    return tuple((folder / medium).read_bytes for medium in media), record


def _of_parquet(path: Path, fields: Fields, kind: type[Medium]) -> Iterator[HeldAt]:
    """Media stay in the file until they are asked for."""
    file = _parquet(path)
    others = [name for name in file.schema_arrow.names if name != fields.medium]
    if fields.medium not in file.schema_arrow.names:
        raise DataError(f"{path} has no column {fields.medium!r}, only {shown(others)}; say which one has {kind.NAME}s")
    number = 0
    for group in range(file.num_row_groups):
        rows = file.read_row_group(group, columns=others).to_pylist()
        for row, record in enumerate(rows or [{}] * file.metadata.row_group(group).num_rows):
            yield f"{path}, row {number},", ((partial(_cell, path, group, row, fields.medium),), record)
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


def _of_tar(path: Path, fields: Fields, kind: type[Medium]) -> Iterator[HeldAt]:
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
        yield f"{path}:{key.lstrip('/')}", _of_parts(path, parts, fields, kind)


def _of_parts(path: Path, parts: dict[str, tarfile.TarInfo], fields: Fields, kind: type[Medium]) -> Held | str:
    medium = next((parts[ending] for ending in kind.ENDINGS if ending in parts), None)
    if medium is None:
        return f"has no {kind.NAME} among {', '.join(sorted(parts))}; mend or remove it"
    said = _said(path, parts, fields)
    return said if isinstance(said, str) else ((_part(path, medium),), said)


def _said(path: Path, parts: dict[str, tarfile.TarInfo], fields: Fields) -> dict[str, Any] | str:
    """The fields of a sample."""
    try:
        record = json.loads(_part(path, parts[".json"])()) if ".json" in parts else {}
        if ".cls" in parts:
            record[fields.label] = int(_part(path, parts[".cls"])())
        if ".txt" in parts:
            record[fields.text] = _part(path, parts[".txt"])().decode()
    except (ValueError, TypeError) as error:
        return f"has a class or fields that cannot be read ({error}); mend it"
    return record if isinstance(record, dict) else {}


def _part(path: Path, member: tarfile.TarInfo) -> Callable[[], bytes]:
    return partial(_read_at, path, member.offset_data, member.size)


def _read_at(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


_READERS: dict[str, Callable[[Path, Fields, type[Medium]], Iterator[HeldAt]]] = {
    ".tar": _of_tar,
    ".parquet": _of_parquet,
    **dict.fromkeys(TEXTS, _of_records),
}
