"""Text to tokens: one file a source, made once, which a kill does not send back to its beginning.

Takes a DataSection; gives a ``.npy`` file of tokens with what they are beside it.  Knows nothing of batches or ranks.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np

from galvatron.core.errors import DataError, GalvatronError
from galvatron.core.job import DataSection
from galvatron.core.records import FileRecord

from .text import Block, Skipped, read_blocks, source_key
from .tokenizer import Tokenizer, load_tokenizer

NOTE_EVERY_S = 10.0
"""How often tokenising notes how far it is, for a start after a kill."""
_BATCH_BLOCKS, _BATCH_CHARACTERS = 256, 1 << 20
_REREAD_TOKENS = 1 << 24

Progress = Callable[[int], None]


class TokenInfo(FileRecord):
    """Beside the tokens: how many, below which id they all are, and the SHA-256 of the tokens as little-endian u4."""

    FORMAT: ClassVar[str] = "galvatron.tokens"
    ERROR: ClassVar[type[GalvatronError]] = DataError

    num_tokens: int
    vocab_size: int
    sha256: str


def prepare_tokens(
    data: DataSection, run_dir: Path, *, progress: Progress | None = None, skipped: Skipped | None = None
) -> Path:
    """Tokenise ``data`` into ``run_dir/data/tokens-<key>.npy`` unless it is there already; its path.

    ``progress`` is called with the number of tokens so far, ``skipped`` told of records that are left out.

    One process only.  The file is a one-dimensional little-endian array of u2 or u4, end-of-text after every
    document; it appears whole or not at all.  What was cut off goes on where it last noted how far it was.
    """
    path = run_dir / "data" / f"tokens-{source_key(data)}.npy"
    if path.exists() and path.with_suffix(".json").exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, note = path.with_suffix(".part"), path.with_suffix(".part.json")
    try:
        tokenizer = load_tokenizer(data.tokenizer)
        skipped = skipped or Skipped()
        info = _write_tokens(part, note, tokenizer, read_blocks(data, skipped), progress)
        if info.num_tokens == 0:
            why = f", as its {skipped.count} records are bad ({skipped.first})" if skipped.count else ""
            raise DataError(f"data.source={data.source!r} has no text{why}; give a source with some")
    except GalvatronError:  # nothing to go on from: the text will be another one
        part.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        with suppress(OSError):
            path.parent.rmdir()
        raise
    info.save(path.with_suffix(".json"))
    os.replace(part, path)
    note.unlink(missing_ok=True)
    return path


class _Note(FileRecord):
    """How far the tokens of a ``.part`` file are: of how many blocks of text, and how many they are."""

    FORMAT: ClassVar[str] = "galvatron.tokens_part"
    ERROR: ClassVar[type[GalvatronError]] = DataError

    num_blocks: int = 0
    num_tokens: int = 0


class _TokenFile:
    """A ``.npy`` file that grows: its tokens' count, the highest, and their SHA-256 as little-endian u4."""

    def __init__(self, file: BinaryIO, dtype: np.dtype, num_tokens: int) -> None:
        self.file, self.dtype = file, dtype
        self.count, self.highest, self.digest = 0, 0, hashlib.sha256()
        header = _npy_header(dtype, 0)
        file.seek(len(header))
        while self.count < num_tokens:
            raw = file.read(min(num_tokens - self.count, _REREAD_TOKENS) * dtype.itemsize)
            self._account(np.frombuffer(raw, dtype))
        file.truncate()
        file.seek(0)
        file.write(header)
        file.seek(0, os.SEEK_END)

    def append(self, tokens: np.ndarray) -> None:
        """Add ``tokens`` [num_tokens]."""
        self.file.write(tokens.astype(self.dtype).data)
        self._account(tokens)

    def finish(self) -> TokenInfo:
        """Write the count into the header."""
        self.file.seek(0)
        self.file.write(_npy_header(self.dtype, self.count))
        self.flush()
        return TokenInfo(num_tokens=self.count, vocab_size=self.highest + 1, sha256=self.digest.hexdigest())

    def flush(self) -> None:
        """Everything on disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def _account(self, tokens: np.ndarray) -> None:
        self.digest.update(tokens.astype("<u4").data)
        self.count += len(tokens)
        self.highest = max(self.highest, int(tokens.max(initial=0)))


def _write_tokens(
    part: Path, note: Path, tokenizer: Tokenizer, blocks: Iterator[Block], progress: Progress | None
) -> TokenInfo:
    """Tokens of ``blocks`` in order, with end-of-text after each document, in ``part``."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    done = _noted(part, note, dtype)
    end = np.array([tokenizer.end_of_text], dtype=np.int64)
    with part.open("r+b" if part.exists() else "w+b") as file:
        tokens = _TokenFile(file, dtype, done.num_tokens)
        num_blocks, noted_s = done.num_blocks, time.monotonic()
        for batch in _batches(islice(blocks, num_blocks, None)):
            for ids in _encode(batch, tokenizer, end):
                tokens.append(ids)
            num_blocks += len(batch)
            if progress is not None:
                progress(tokens.count)
            if time.monotonic() - noted_s > NOTE_EVERY_S:
                tokens.flush()
                _Note(num_blocks=num_blocks, num_tokens=tokens.count).save(note)
                noted_s = time.monotonic()
        return tokens.finish()


def _noted(part: Path, note: Path, dtype: np.dtype) -> _Note:
    """What ``note`` says, if ``part`` holds as much."""
    if not (part.exists() and note.exists()):
        return _Note()
    done = _Note.load(note)
    whole = len(_npy_header(dtype, 0)) + done.num_tokens * dtype.itemsize
    return done if part.stat().st_size >= whole else _Note()


def _batches(blocks: Iterator[Block]) -> Iterator[list[Block]]:
    """``blocks`` in order, as many together as are worth a call of the tokenizer."""
    batch: list[Block] = []
    size = 0
    for block in blocks:
        batch.append(block)
        size += len(block[0])
        if len(batch) == _BATCH_BLOCKS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: list[Block], tokenizer: Tokenizer, end: np.ndarray) -> Iterator[np.ndarray]:
    for ids, (_, is_end) in zip(tokenizer.encode_batch([text for text, _ in batch]), batch, strict=True):
        yield ids
        if is_end:
            yield end


def _npy_header(dtype: np.dtype, count: int) -> bytes:
    """A .npy header (version 1.0) of fixed length, so that the count can be filled in when it is known."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
