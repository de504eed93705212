"""Where text comes from: files, Hugging Face datasets, or the language reference that Python carries.

Gives documents as blocks of text; knows nothing of tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galvatron.core.errors import DataError
from galvatron.core.job import DataSection
from galvatron.core.words import shown

PYTHON_DOCS = "python-docs"
# A long document is tokenised in blocks of about this many characters, cut at line ends, so memory stays bounded.
BLOCK_CHARACTERS = 1 << 20

MAX_LISTED = 8  # of a record's fields
_SURROGATE = re.compile("[\ud800-\udfff]")

Block = tuple[str, bool]


@dataclass
class Skipped:
    """The records that were left out so far: how many, and what is wrong with the first."""

    count: int = 0
    first: str = ""

    def add(self, reason: str) -> None:
        """One more."""
        self.count, self.first = self.count + 1, self.first or reason


def read_blocks(data: DataSection, skipped: Skipped | None = None) -> Iterator[Block]:
    """Blocks (text, whether it ends a document) of every non-empty document of ``data.source``, in fixed order.

    ``skipped`` is told of the records that ``data.skip_bad_records`` leaves out.

    Raises:
        DataError: the source does not exist or cannot be read, or a record lacks ``data.text_field``.
    """
    skipped = skipped or Skipped()
    path = Path(data.source)
    if data.source == PYTHON_DOCS:
        from pydoc_data.topics import topics

        yield from ((topics[key], True) for key in sorted(topics) if topics[key])
    elif path.exists() and (files := text_files(path)):
        for file in files:
            yield from _file_blocks(file, data, skipped)
    elif path.suffix in (".txt", ".jsonl"):
        raise DataError(f"{path} does not exist; check data.source")
    else:
        yield from _dataset_blocks(data, skipped)


def text_files(path: Path) -> list[Path]:
    """``path`` itself, or the ``.txt`` and ``.jsonl`` files below it, sorted; none for a Hugging Face dataset."""
    if path.is_file():
        if path.suffix not in (".txt", ".jsonl"):
            raise DataError(f"{path} must end in .txt or .jsonl; rename or convert it")
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl") and file.is_file())


def source_key(data: DataSection) -> str:
    """A digest of what the tokens depend on: settings and, for files, their names, sizes and change times."""
    parts: list[Any] = [data.source, data.tokenizer, data.text_field, data.split, sys.version_info[:3]]
    parts += ["skip_bad_records"] * data.skip_bad_records
    for name in (data.source, data.tokenizer):
        path = Path(name)
        files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
        parts += [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _file_blocks(path: Path, data: DataSection, skipped: Skipped) -> Iterator[Block]:
    try:
        with path.open(encoding="utf-8-sig") as lines:  # a byte order mark is no text
            if path.suffix == ".jsonl":
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield from _record_block(_json_text, line, f"{path}:{number}", data, skipped)
            else:
                yield from _line_blocks(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}; mend or remove it") from None


def _line_blocks(lines: Iterator[str]) -> Iterator[Block]:
    block: list[str] = []
    size = 0
    for line in lines:
        if size >= BLOCK_CHARACTERS:
            yield "".join(block), False
            block, size = [], 0
        block.append(line)
        size += len(line)
    if block:
        yield "".join(block), True


def _record_block(
    read: Callable[[Any, str], str], record: Any, where: str, data: DataSection, skipped: Skipped
) -> Iterator[Block]:
    """The document that ``read`` finds in ``record``, unless it is empty, or bad and to be skipped."""
    try:
        text = read(record, data.text_field)
    except _BadRecord as bad:
        if not data.skip_bad_records:
            raise DataError(f"{where} {bad}, or data.skip_bad_records = true to leave such records out") from None
        skipped.add(f"{where} {bad}")
    else:
        if text:
            yield text, True


class _BadRecord(Exception):
    """What is wrong with a record, and what to do about it."""


def _json_text(line: str, text_field: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        raise _BadRecord(f"is not JSON ({reason}); mend that line") from None
    if not isinstance(record, dict):
        raise _BadRecord(f"must be a JSON object with the field {text_field!r}; mend that line")
    return _text(record, text_field)


def _text(record: dict[str, Any], text_field: str) -> str:
    if text_field in record and record[text_field] is None:
        raise _BadRecord(f"has no text in field {text_field!r} but null; mend that record")
    if not isinstance(record.get(text_field), str):
        texts = sorted(shown(key) for key, value in record.items() if isinstance(value, str))
        known = ", ".join(texts[:MAX_LISTED]) or "none"
        raise _BadRecord(f"has no text in field {text_field!r}, its text fields: {known}; set data.text_field")
    text: str = record[text_field]
    if not text.isascii() and _SURROGATE.search(text):
        raise _BadRecord(f"has half a character in field {text_field!r}; mend that text")
    return text


def _dataset_blocks(data: DataSection, skipped: Skipped) -> Iterator[Block]:
    for number, record in enumerate(_load_dataset(data)):
        yield from _record_block(_text, record, f"{data.source}, row {number},", data, skipped)


def _load_dataset(data: DataSection) -> Any:
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
            f"loads ({type(error).__name__}: {reason}); give a .txt or .jsonl file, a directory of them, a dataset "
            f"or {PYTHON_DOCS!r}"
        ) from None
