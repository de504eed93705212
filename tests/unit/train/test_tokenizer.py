"""The byte tokenizer, and the same as a tokenizer of transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from galvatron.core.errors import DataError
from galvatron.train.tokenizer import END_OF_TEXT, ByteTokenizer, load_tokenizer

END = ByteTokenizer.end_of_text
DRAW = random.Random(0)
CHARACTERS = [*range(0xD800), *range(0xE000, 0x110000)]  # all but surrogates


def test_byte_tokens_round_trip_and_broken_utf8_does_not_raise() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("Größe ✓\n")
    assert ids.tolist() == list("Größe ✓\n".encode())
    assert tokenizer.decode([*ids.tolist(), END]) == "Größe ✓\n"
    assert tokenizer.decode([0xE2, 0x9C]) == "\ufffd"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The byte tokenizer as transformers saves it and loads it again."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    ByteTokenizer().for_transformers().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  two  spaces, don't\r\n\ttab",
        "Größe ✓ 漢字 🙂",
        f"a text that spells {END_OF_TEXT}",
        "".join(map(chr, range(256))),
        "".join(map(chr, DRAW.choices(CHARACTERS, k=2000))),
    ],
)
def test_transformers_gives_the_same_ids_and_the_text_back(saved: Any, text: str) -> None:
    assert saved(text)["input_ids"] == ByteTokenizer().encode(text).tolist()
    assert saved.decode(saved(text)["input_ids"]) == text


def test_transformers_reads_any_bytes_alike_and_knows_the_end(saved: Any) -> None:
    assert (len(saved), saved.eos_token_id) == (ByteTokenizer.vocab_size, END)
    for _ in range(100):
        ids = DRAW.choices(range(257), k=50)
        assert saved.decode(ids, skip_special_tokens=True) == ByteTokenizer().decode(ids)
    assert saved.decode([END]) == END_OF_TEXT


def test_a_directory_without_a_vocabulary_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DataError, match="has no words, only 5 special tokens; give a directory with the tokenizer's"):
        load_tokenizer(str(tmp_path))
