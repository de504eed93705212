"""Text as it comes: with byte order marks, and with records that hold none."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from galvatron.core.errors import DataError
from galvatron.core.job import DataSection
from galvatron.train.text import Block, Skipped, read_blocks, source_key

BAD = [b"null", b'{"text": null}', b'{"body": "x"}', b"[1]", b'"text"', b'{"text": ', b"[" * 100_000]


@pytest.mark.parametrize(("name", "content"), [("a.txt", "text"), ("a.jsonl", '{"text": "text"}\n')])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, content: str) -> None:
    where = f"{tmp_path / name}" + ":1" * (name == "a.jsonl")
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + content.encode())
    assert list(read_blocks(DataSection(source=str(tmp_path / name)))) == [Block("text", where)]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_record_names_its_line_and_the_way_around_it(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n\n' + bad + b"\n")
    with pytest.raises(DataError, match=r"a\.jsonl:3 .* or data.skip_bad_records = true to leave such records out"):
        list(read_blocks(DataSection(source=str(tmp_path))))


def test_bad_records_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' + b"\n".join(BAD) + b'\n{"text": ""}\n{"text": "y"}\n')
    data, skipped = DataSection(source=str(tmp_path), skip_bad_records=True), Skipped(allowed=True)
    assert [block.text for block in read_blocks(data, skipped)] == ["x", "y"]
    assert skipped.count == len(BAD)
    assert skipped.first == f"{tmp_path}/a.jsonl:2 must be a JSON object with named fields; mend that line"


def test_rows_of_a_dataset_are_skipped_and_counted(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["x", None, "y"]}).save_to_disk(tmp_path / "set")
    data, skipped = DataSection(source=str(tmp_path / "set"), skip_bad_records=True), Skipped(allowed=True)
    assert [block.text for block in read_blocks(data, skipped)] == ["x", "y"]
    assert (skipped.count, skipped.first.partition(" has ")[0]) == (1, f"{tmp_path}/set, row 1,")


def test_what_is_skipped_is_part_of_what_tokens_depend_on() -> None:
    data = DataSection(source="python-docs")
    assert source_key(data) != source_key(data.model_copy(update={"skip_bad_records": True}))
