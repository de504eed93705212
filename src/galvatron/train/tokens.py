"""Text to tokens: one file a source, made once, which a kill does not send back to its beginning.

Takes a DataSection; gives a ``.npy`` file of tokens with what they are beside it.  Knows nothing of batches or ranks.

Where documents are apart or learnt in part, two bits above a token's id say so (``BEGINS``, ``UNLEARNT``).
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

from .chat import ChatTemplate
from .text import Block, Skipped, Spans, read_blocks, source_key
from .tokenizer import Tokenizer, load_tokenizer

NOTE_EVERY_S = 10.0
"""How often tokenising notes how far it is, for a start after a kill."""
BEGINS, UNLEARNT = np.uint32(1 << 31), np.uint32(1 << 30)
"""Set in a token that begins a document, and in one that no model shall learn to say; ids are below both."""
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
    data: DataSection,
    run_dir: Path,
    *,
    seq_len: int | None = None,
    progress: Progress | None = None,
    skipped: Skipped | None = None,
) -> Path:
    """Tokenise ``data`` into ``run_dir/data/tokens-<key>.npy`` unless it is there already; its path.

    ``progress`` is called with the number of tokens so far, ``skipped`` told of records that are left out.  Of
    conversations and pairs none may be longer than ``seq_len``: what is cut off has lost what it answers.

    One process only.  The file is a one-dimensional little-endian array of u2 or u4, end-of-text after every
    document but conversations, which end as their template says; it appears whole or not at all.  What was cut off goes
    on where it last noted how far it was.
    """
    longest = None if data.records == "text" else seq_len
    path = run_dir / "data" / f"tokens-{source_key(data, *([longest] * (longest is not None)))}.npy"
    if path.exists() and path.with_suffix(".json").exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, note = path.with_suffix(".part"), path.with_suffix(".part.json")
    try:
        skipped = skipped or Skipped(data.skip_bad_records)
        tokenizer = load_tokenizer(data.tokenizer, data.chat_template)
        renders = data.records == "conversations"
        template = ChatTemplate(tokenizer.for_transformers()) if renders else None
        encoder = Encoder(data, tokenizer, longest, skipped)
        info = _write_tokens(part, note, encoder, read_blocks(data, skipped, template), progress)
        if info.num_tokens == 0:
            raise DataError(f"data.source={data.source!r} has no text{skipped.told()}; give a source with some")
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
        self.highest = max(self.highest, int(ids_of(tokens).max(initial=0)))


def ids_of(tokens: np.ndarray) -> np.ndarray:
    """``tokens`` without what is said of them."""
    return tokens if tokens.dtype.itemsize < 4 else tokens & ~(BEGINS | UNLEARNT)


def _write_tokens(
    part: Path, note: Path, encoder: Encoder, blocks: Iterator[Block], progress: Progress | None
) -> TokenInfo:
    """Tokens of ``blocks`` in order, in ``part``."""
    dtype = encoder.dtype
    done = _noted(part, note, dtype)
    with part.open("r+b" if part.exists() else "w+b") as file:
        tokens = _TokenFile(file, dtype, done.num_tokens)
        num_blocks, noted_s = done.num_blocks, time.monotonic()
        for batch in _batches(islice(blocks, num_blocks, None)):
            for ids in encoder.encode(batch):
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
        size += len(block.text)
        if len(batch) == _BATCH_BLOCKS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Encoder:
    """Blocks to tokens, with what ``data`` asks to be said of them; counts what is too long and may be left out."""

    def __init__(self, data: DataSection, tokenizer: Tokenizer, longest: int | None, skipped: Skipped) -> None:
        self.data, self.tokenizer, self.longest, self.skipped = data, tokenizer, longest, skipped
        self.says = data.is_apart
        small = tokenizer.vocab_size <= 1 << 16 and not self.says
        self.dtype = np.dtype("<u2" if small else "<u4")
        self._end = np.array([tokenizer.end_of_text], dtype=np.int64)

    def encode(self, batch: list[Block]) -> Iterator[np.ndarray]:
        """The tokens of each block of ``batch``, of all that are not left out."""
        texts = [block.text for block in batch]
        if self.data.records == "text":
            for ids, block in zip(self.tokenizer.encode_batch(texts), batch, strict=True):
                whole = np.concatenate((ids, self._end)) if block.ends else ids
                yield self._said(whole, np.ones(len(whole), bool), begins=block.begins) if self.says else whole
            return
        for (ids, places), block in zip(self.tokenizer.encode_with_places(texts), batch, strict=True):
            learnt = _within(places, block.learnt or ())
            if self.data.records == "pairs":
                ids, learnt = np.concatenate((ids, self._end)), np.append(learnt, True)
            # a row's last token is nothing's input
            if self.longest is not None and len(ids) > self.longest + 1:
                reason = f"has {len(ids)} tokens, of which a row of seq_len={self.longest} has no place for all"
                self.skipped.refuse(f"{block.where} {reason}; raise seq_len")
            else:
                yield self._said(ids, learnt, begins=True)

    def _said(self, ids: np.ndarray, learnt: np.ndarray, *, begins: bool) -> np.ndarray:
        said = ids.astype(np.uint32) | np.where(learnt, np.uint32(0), UNLEARNT)
        said[: int(begins)] |= BEGINS
        return said


def _within(places: np.ndarray, spans: Spans) -> np.ndarray:
    """[number of tokens]: which have a character of ``spans``, by the ``places`` [number of tokens, 2] of theirs."""
    found = np.zeros(len(places), bool)
    for start, stop in spans:
        found |= (places[:, 0] < stop) & (places[:, 1] > start) & (places[:, 1] > places[:, 0])
    return found


def _npy_header(dtype: np.dtype, count: int) -> bytes:
    """A .npy header (version 1.0) of fixed length, so that the count can be filled in when it is known."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
