"""Where records come from: files of four kinds, Hugging Face datasets, or the language reference that Python carries.

Takes a source; gives records, each with the words that say where it stands.  Knows nothing of what a record means.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any, TextIO

from galvatron.core.errors import DataError
from galvatron.core.job import DataSection

PYTHON_DOCS = "python-docs"
KINDS = (".txt", ".jsonl", ".csv", ".parquet")
LISTED = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}, or .gz of these"

_UNREADABLE = (OSError, EOFError, zlib.error)
"""What files, and packed ones, raise."""

Found = tuple[str, dict[str, Any] | str]
"""Where a record stands, and the record; a text where it should be one and is not: what is wrong with it."""


def text_files(path: Path) -> list[Path]:
    """``path`` itself, or the files of ``KINDS`` below it, sorted; none for a Hugging Face dataset."""
    if path.is_file():
        if kind_of(path) not in KINDS:
            raise DataError(f"{path} must end in {LISTED}; rename or convert it")
        return [path]
    return sorted(file for file in path.rglob("*") if kind_of(file) in KINDS and file.is_file())


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, ``.gz`` around it or not."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def records_of(path: Path) -> Iterator[Found]:
    """The records of a file that is no plain text, in order, by line or row.  Raises DataError if it cannot be read."""
    try:
        yield from _READERS[kind_of(path)](path)
    except (*_UNREADABLE, csv.Error, ValueError) as error:
        reason = str(error).split("\n", 1)[0]
        raise DataError(f"{path} cannot be read as {kind_of(path)[1:]}: {reason}; mend or remove it") from None


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """``path`` as UTF-8 text, unpacked if need be.  Raises DataError if it is none."""
    unpack: Any = gzip.open if _is_packed(path) else open
    try:
        with unpack(path, "rt", encoding="utf-8-sig", newline=newline) as file:  # a byte order mark is no text
            yield file
    except (*_UNREADABLE, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}; mend or remove it") from None


def _is_packed(path: Path) -> bool:
    return path.suffix == ".gz"


def _json_lines(path: Path) -> Iterator[Found]:
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _json_object(line)


def _json_object(line: str) -> dict[str, Any] | str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        return f"is not JSON ({reason}); mend that line"
    return record if isinstance(record, dict) else "must be a JSON object with named fields; mend that line"


def _csv_rows(path: Path) -> Iterator[Found]:
    with open_text(path, newline="") as lines:
        rows = csv.DictReader(lines, strict=True)
        for row in rows:
            whole = None not in row and None not in row.values()
            fields = f"must have the {len(rows.fieldnames or ())} fields that the first line names; mend that line"
            yield f"{path}:{rows.line_num}", row if whole else fields


def _parquet_rows(path: Path) -> Iterator[Found]:
    import pyarrow.parquet

    file: IO[bytes] | Path = BytesIO(gzip.decompress(path.read_bytes())) if _is_packed(path) else path
    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            yield f"{path}, row {number},", row
            number += 1


_READERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    ".jsonl": _json_lines,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def read_records(data: DataSection) -> Iterator[Found]:
    """All records of ``data.source``, files or a dataset.  Raises DataError."""
    path = Path(data.source)
    files = text_files(path) if path.exists() else []
    if not files and kind_of(path) in KINDS:
        raise DataError(f"{path} does not exist; check data.source")
    for found in map(records_of, files) if files else [dataset_rows(data)]:
        yield from found


def dataset_rows(data: DataSection) -> Iterator[Found]:
    """The rows of the Hugging Face dataset that ``data.source`` is.  Raises DataError if it is none."""
    for number, row in enumerate(_load(data)):
        yield f"{data.source}, row {number},", row


def _load(data: DataSection) -> Any:
    import datasets

    try:
        if (Path(data.source) / "dataset_dict.json").exists():
            return datasets.load_from_disk(data.source)[data.split]
        if (Path(data.source) / "dataset_info.json").exists():
            return datasets.load_from_disk(data.source)
        return datasets.load_dataset(data.source, split=data.split)
    except Exception as error:  # the library raises dozens of kinds; each means that there is no such data
        reason = str(error).split("\n", 1)[0]
        raise DataError(
            f"data.source={data.source!r}, split {data.split!r}, is neither a file nor a Hugging Face dataset that "
            f"loads ({type(error).__name__}: {reason}); give a file that ends in {LISTED}, a directory of them, a "
            f"dataset or {PYTHON_DOCS!r}"
        ) from None
