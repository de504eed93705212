"""Documents: what the records of a source say, as text, and which characters of it are learnt.

Takes a DataSection; gives blocks of text in a fixed order.  Knows nothing of tokens.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from galvatron.core.errors import DataError
from galvatron.core.job import DataSection
from galvatron.core.words import shown

from .chat import BadConversation, ChatTemplate
from .sources import KINDS, PYTHON_DOCS, Found, dataset_rows, kind_of, open_text, records_of, text_files

# A long document is tokenised in blocks of about this many characters, cut at line ends, so memory stays bounded.
BLOCK_CHARACTERS = 1 << 20

MAX_LISTED = 8  # of a record's fields
_SURROGATE = re.compile("[\ud800-\udfff]")

R = TypeVar("R")
T = TypeVar("T")
Spans = tuple[tuple[int, int], ...]


class Block(NamedTuple):
    """A document's text, or a part of it.

    Attributes:
        where: for people.
        begins, ends: a document.
        learnt: from which to before which character a model shall learn; None: all, and that the document ends there.
    """

    text: str
    where: str = ""
    begins: bool = True
    ends: bool = True
    learnt: Spans | None = None


@dataclass
class Skipped:
    """The records that were left out so far, if any may be: how many, and what is wrong with the first."""

    allowed: bool = False
    count: int = 0
    first: str = ""

    def refuse(self, reason: str) -> None:
        """One more if it may be left out, else DataError."""
        if not self.allowed:
            raise DataError(f"{reason}, or data.skip_bad_records = true to leave such records out")
        self.count, self.first = self.count + 1, self.first or reason

    def told(self) -> str:
        """Why a source has nothing, to be put behind that it has: empty if nothing was left out."""
        return f", as its {self.count} records are bad ({self.first})" if self.count else ""


def read_blocks(
    data: DataSection, skipped: Skipped | None = None, template: ChatTemplate | None = None
) -> Iterator[Block]:
    """Blocks of every non-empty document of ``data.source``, in fixed order.

    ``skipped`` is told of the records that ``data.skip_bad_records`` leaves out; ``template`` renders conversations.

    Raises:
        DataError: the source does not exist or cannot be read, or a record is not what ``data`` says of it.
    """
    skipped, path = skipped or Skipped(data.skip_bad_records), Path(data.source)
    read = reader(data, template)
    if data.source == PYTHON_DOCS:
        from pydoc_data.topics import topics

        yield from (Block(topics[key], key) for key in sorted(topics) if topics[key])
    elif path.exists() and (files := text_files(path)):
        for file in files:
            if kind_of(file) == ".txt":
                yield from _plain_blocks(file, data)
            else:
                yield from _record_blocks(records_of(file), read, skipped)
    elif kind_of(path) in KINDS:
        raise DataError(f"{path} does not exist; check data.source")
    else:
        yield from _record_blocks(dataset_rows(data), read, skipped)


def source_key(data: DataSection, *settings: Any) -> str:
    """A digest of what the tokens depend on: settings and, for files, their names, sizes and change times."""
    parts: list[Any] = [data.source, data.tokenizer, data.text_field, data.split, sys.version_info[:3], *settings]
    parts += ["skip_bad_records"] * data.skip_bad_records + ["is_apart"] * data.is_apart
    if data.records != "text":
        parts += [data.records, data.messages_field, data.prompt_field, data.completion_field, data.chat_template]
    for name in (data.source, data.tokenizer, data.chat_template):
        path = Path(name or "/dev/null")
        files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
        parts += [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _plain_blocks(path: Path, data: DataSection) -> Iterator[Block]:
    if data.records != "text":
        raise DataError(f"{path} is plain text, not records of {data.records}; give files of .jsonl, .csv or .parquet")
    with open_text(path) as lines:
        block: list[str] = []
        size, begins = 0, True
        for line in lines:
            if size >= BLOCK_CHARACTERS:
                yield Block("".join(block), str(path), begins=begins, ends=False)
                block, size, begins = [], 0, False
            block.append(line)
            size += len(line)
        if block:
            yield Block("".join(block), str(path), begins=begins)


class BadRecord(Exception):
    """What is wrong with a record, and what to do about it."""


Read = Callable[[dict[str, Any]], tuple[str, Spans | None]]


def _record_blocks(records: Iterator[Found], read: Read, skipped: Skipped) -> Iterator[Block]:
    """The document that ``read`` finds in each record, unless it is empty, or bad and to be skipped."""
    for where, (text, learnt) in good(records, lambda where, record: (where, read(record)), skipped):
        if text:
            yield Block(text, where, learnt=learnt)


def good(records: Iterable[tuple[str, R | str]], make: Callable[[str, R], T], skipped: Skipped) -> Iterator[T]:
    """What ``make`` makes of each record and where it stands, of all that are not left out.

    Raises:
        DataError: ``make`` raises BadRecord, or a record is none, and ``skipped`` allows none.
    """
    for where, record in records:
        try:
            if isinstance(record, str):
                raise BadRecord(record)
            made = make(where, record)
        except BadRecord as bad:
            skipped.refuse(f"{where} {bad}")
        else:
            yield made


def reader(data: DataSection, template: ChatTemplate | None = None) -> Read:
    """What a record's text is, and what of it is learnt; ``template`` renders conversations."""

    def pair(record: dict[str, Any]) -> tuple[str, Spans | None]:
        prompt = _text(record, data.prompt_field, "data.prompt_field")
        completion = _text(record, data.completion_field, "data.completion_field")
        if not completion:
            raise BadRecord(f"has nothing to learn in field {data.completion_field!r}; mend that record")
        return prompt + completion, ((len(prompt), len(prompt) + len(completion)),)

    def conversation(record: dict[str, Any]) -> tuple[str, Spans | None]:
        assert template is not None
        messages = record.get(data.messages_field)
        if not isinstance(messages, list):
            known = listed(key for key, value in record.items() if isinstance(value, list))
            raise BadRecord(
                f"has no messages in field {data.messages_field!r}, its lists: {known}; set data.messages_field"
            )
        try:
            text, learnt = template.render(messages)
        except BadConversation as bad:
            raise BadRecord(str(bad)) from None
        return _whole(text, data.messages_field), learnt

    readers: dict[str, Read] = {"pairs": pair, "conversations": conversation}
    return readers.get(data.records, lambda record: (_text(record, data.text_field, "data.text_field"), None))


def _text(record: dict[str, Any], field: str, setting: str) -> str:
    if field in record and record[field] is None:
        raise BadRecord(f"has no text in field {field!r} but null; mend that record")
    if not isinstance(record.get(field), str):
        known = listed(key for key, value in record.items() if isinstance(value, str))
        raise BadRecord(f"has no text in field {field!r}, its text fields: {known}; set {setting}")
    return _whole(record[field], field)


def _whole(text: str, field: str) -> str:
    if not text.isascii() and _SURROGATE.search(text):
        raise BadRecord(f"has half a character in field {field!r}; mend that text")
    return text


def listed(names: Iterable[str]) -> str:
    """Some names of fields, for people."""
    return ", ".join(sorted(map(shown, names))[:MAX_LISTED]) or "none"
