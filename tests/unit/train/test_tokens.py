"""Tokenising that is cut off goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from galvatron.core.errors import DataError
from galvatron.core.job import DataSection
from galvatron.train import tokens as tokens_module
from galvatron.train.text import Block, read_blocks
from galvatron.train.tokenizer import ByteTokenizer
from galvatron.train.tokens import TokenInfo, prepare_tokens

WORDS = [f"document {number}, über alles" for number in range(1000)]


@pytest.fixture
def data(tmp_path: Path) -> DataSection:
    (tmp_path / "text").mkdir()
    for number, words in enumerate(WORDS):
        (tmp_path / "text" / f"{number:04d}.txt").write_text(words)
    return DataSection(source=str(tmp_path / "text"))


class Killed(BaseException):
    pass


def _kill_after(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    """Tokenising ends at once, with no word, when it is that far."""

    def encode(self: Any, texts: list[str]) -> list[np.ndarray]:
        if self.seen > num_tokens:
            raise Killed
        arrays = original(self, texts)
        self.seen += sum(map(len, arrays))
        return arrays

    original = ByteTokenizer.encode_batch
    monkeypatch.setattr(ByteTokenizer, "seen", 0, raising=False)
    monkeypatch.setattr(ByteTokenizer, "encode_batch", encode)


def _read_with_count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the tokenizer was asked for a text."""
    asked = [0]
    original = ByteTokenizer.encode_batch

    def encode(self: Any, texts: list[str]) -> list[np.ndarray]:
        asked[0] += len(texts)
        return original(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_batch", encode)
    return asked


def test_what_was_cut_off_goes_on(data: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare_tokens(data, tmp_path / "whole")
    monkeypatch.setattr(tokens_module, "NOTE_EVERY_S", -1.0)
    with monkeypatch.context() as patch:
        _kill_after(patch, 10_000)
        with pytest.raises(Killed):
            prepare_tokens(data, tmp_path / "cut")
    assert len(list((tmp_path / "cut" / "data").glob("*.part"))) == 1
    with next((tmp_path / "cut" / "data").glob("*.part")).open("ab") as file:
        file.write(b"what came after the note")
    asked = _read_with_count(monkeypatch)
    counts: list[int] = []
    cut = prepare_tokens(data, tmp_path / "cut", progress=counts.append)
    assert counts[0] > 10_000
    assert 0 < asked[0] < len(WORDS)
    assert cut.read_bytes() == whole.read_bytes()
    assert TokenInfo.load(cut.with_suffix(".json")) == TokenInfo.load(whole.with_suffix(".json"))
    assert sorted(path.suffix for path in cut.parent.iterdir()) == [".json", ".npy"]


def test_a_part_shorter_than_its_note_begins_again(
    data: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare_tokens(data, tmp_path / "whole")
    monkeypatch.setattr(tokens_module, "NOTE_EVERY_S", -1.0)
    with monkeypatch.context() as patch:
        _kill_after(patch, 10_000)
        with pytest.raises(Killed):
            prepare_tokens(data, tmp_path / "cut")
    part = next((tmp_path / "cut" / "data").glob("*.part"))
    part.write_bytes(part.read_bytes()[:1000])
    assert prepare_tokens(data, tmp_path / "cut").read_bytes() == whole.read_bytes()


def test_blocks_come_in_one_order(data: DataSection) -> None:
    def texts(blocks: Iterator[Block]) -> list[str]:
        return [block.text for block in blocks]

    assert texts(read_blocks(data)) == texts(read_blocks(data)) == WORDS


def test_nothing_but_bad_records_is_refused_with_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')
    data = DataSection(source=str(tmp_path / "a.jsonl"), skip_bad_records=True)
    with pytest.raises(DataError, match=r"has no text, as its 2 records are bad \(.*a\.jsonl:1 has no text in field"):
        prepare_tokens(data, tmp_path)
