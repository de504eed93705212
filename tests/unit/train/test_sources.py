"""The same records, whatever kind of file they come in."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from galvatron.core.errors import DataError
from galvatron.core.job import DataSection
from galvatron.train.text import Skipped, read_blocks

PACKED = gzip.compress(b"text", mtime=0)  # parameters whose names are the same in every process
FLIPPED = PACKED[:10] + b"\xff" + PACKED[11:]
RECORDS = [{"text": 'one, "quoted"\nover lines', "kind": "a"}, {"text": "zwei", "kind": "ü"}]


def write(path: Path, records: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if plain.suffix == ".jsonl":
        plain.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif plain.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), plain)
    else:
        with plain.open("w", newline="") as file:
            rows = csv.DictWriter(file, list(records[0]))
            rows.writeheader()
            rows.writerows(records)
    if plain != path:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz", "a.csv.gz", "a.parquet.gz"])
def test_every_kind_of_file_gives_its_texts(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, RECORDS)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"packed\ntext"))
    blocks = list(read_blocks(DataSection(source=str(tmp_path))))
    assert [block.text for block in blocks] == [*(record["text"] for record in RECORDS), "packed\ntext"]
    assert all(str(tmp_path / name) in block.where for block in blocks[:2])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"text,kind\nx,y\nz\n", r"a\.csv:3 must have the 2 fields that the first line names"),
        ("a.csv", b"text,kind\nx,y,z\n", r"a\.csv:2 must have the 2 fields"),
        ("a.csv", b'text\n"x\n', r"a\.csv cannot be read as csv"),
        ("a.csv", b"body\nx\n", r"a\.csv:2 has no text in field 'text', its text fields: 'body'"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet cannot be read as parquet: .*; mend or remove it"),
        ("a.txt.gz", b"not packed", r"a\.txt\.gz cannot be read as UTF-8 text: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9],
            r"a\.jsonl\.gz cannot be read as UTF-8 text",
        ),
        ("a.txt.gz", FLIPPED, r"a\.txt\.gz cannot be read as UTF-8 text: Error -3 while decompressing"),
        ("a.parquet.gz", FLIPPED, r"a\.parquet\.gz cannot be read as parquet: Error -3 while decompressing"),
        ("a.parquet.gz", b"not packed", r"a\.parquet\.gz cannot be read as parquet: Not a gzipped file"),
    ],
)
def test_a_bad_file_names_itself_and_the_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(read_blocks(DataSection(source=str(tmp_path / name))))


def test_a_row_of_null_is_skipped_by_its_number(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{"text": "x"}, {"text": None}, {"text": "y"}])
    data, skipped = DataSection(source=str(tmp_path), skip_bad_records=True), Skipped(allowed=True)
    assert [block.text for block in read_blocks(data, skipped)] == ["x", "y"]
    assert skipped.first.startswith(f"{tmp_path}/a.parquet, row 1, has no text in field 'text' but null")
