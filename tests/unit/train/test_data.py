from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from train_fakes import section

from galvatron.core.errors import DataError
from galvatron.core.job import DataSection
from galvatron.train import text as text_module
from galvatron.train.data import IGNORED_LABEL, Dataset
from galvatron.train.load import load_dataset
from galvatron.train.rows import StreamRows
from galvatron.train.tokenizer import ByteTokenizer, load_tokenizer
from galvatron.train.tokens import prepare_tokens

END = 256


def dataset(num_tokens: int = 101, **changes: object) -> Dataset:
    return Dataset(StreamRows(np.arange(num_tokens), 4), **{"global_batch_size": 3, "seed": 1, **changes})


def tokens_of(data: DataSection, run_dir: Path) -> list[int]:
    return np.load(prepare_tokens(data, run_dir)).tolist()


def test_rows_are_the_tokens_and_labels_are_shifted_by_one() -> None:
    inputs, labels = dataset().batch(0).values()
    assert inputs.dtype == labels.dtype == torch.int64
    assert inputs.shape == labels.shape == (3, 4)
    assert torch.equal(labels, inputs + 1)
    assert all(first % 4 == 0 for first in inputs[:, 0].tolist())


def test_an_epoch_sees_every_training_row_once_and_no_evaluation_row() -> None:
    data = dataset(global_batch_size=5, eval_fraction=0.2)
    assert (len(data.train_rows), len(data.eval_rows)) == (20, 5)
    seen = sorted(int(row) // 4 for step in range(4) for row in data.batch(step)["input_ids"][:, 0])
    assert seen == data.train_rows.tolist()
    assert not set(seen) & set(data.eval_rows.tolist())


def test_order_wraps_over_epochs_and_differs_between_them() -> None:
    data = dataset(global_batch_size=20)  # 25 rows: the second batch straddles two epochs
    rows = torch.cat([data.batch(step)["input_ids"][:, 0] for step in range(5)]).tolist()
    epochs = [rows[i : i + 25] for i in range(0, 100, 25)]
    assert all(sorted(epoch) == list(range(0, 100, 4)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_depends_on_the_seed_alone() -> None:
    forwards, backwards = dataset(), dataset()
    steps = list(range(20))
    first = {step: forwards.batch(step)["input_ids"] for step in steps}
    again = {step: backwards.batch(step)["input_ids"] for step in reversed(steps)}
    assert all(torch.equal(first[step], again[step]) for step in steps)
    assert not torch.equal(dataset(seed=2).batch(0)["input_ids"], first[0])


def test_order_is_frozen_over_versions() -> None:
    assert dataset().batch(0)["input_ids"][:, 0].tolist() == [52, 64, 92]


def test_order_does_not_depend_on_the_batch_size() -> None:
    small = torch.cat([dataset(global_batch_size=2).batch(step)["input_ids"] for step in range(6)])
    large = torch.cat([dataset(global_batch_size=4).batch(step)["input_ids"] for step in range(3)])
    assert torch.equal(small, large)


def test_evaluation_rows_are_spread_and_the_last_batch_is_padded_with_ignored_labels() -> None:
    data = dataset(401, eval_fraction=0.05)
    assert np.diff(data.eval_rows).tolist() == [20] * 4
    assert data.num_eval_batches == 2
    inputs, labels = data.eval_batch(1).values()
    assert inputs.shape == (3, 4)
    assert (labels[:2] == inputs[:2] + 1).all()
    assert (labels[2] == IGNORED_LABEL).all()


def test_a_positive_fraction_has_at_least_one_row_and_zero_has_none() -> None:
    assert len(dataset(eval_fraction=0.001).eval_rows) == 1
    assert len(dataset(eval_fraction=0.0).eval_rows) == dataset().num_eval_batches == 0


@pytest.mark.parametrize(
    ("num_tokens", "changes", "needed"),
    [(3, {}, 13), (12, {}, 13), (13, {"eval_fraction": 0.1}, 17), (0, {}, 13)],
)
def test_too_short_says_what_is_there_and_what_is_needed(num_tokens: int, changes: dict, needed: int) -> None:
    with pytest.raises(DataError, match=rf"needs about {needed} tokens but the source has {num_tokens}"):
        dataset(num_tokens, **changes)
    dataset(needed, **changes)


def test_documents_end_with_end_of_text_and_empty_ones_vanish(tmp_path: Path) -> None:
    lines = [{"text": "ab"}, {"text": ""}, {"text": "c"}]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "2.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "d" / "1.txt").write_text("x\ny")
    (tmp_path / "d" / "notes.md").write_text("not text to train on")
    expected = [*b"x\ny", END, *b"ab", END, *b"c", END]
    assert tokens_of(DataSection(source=str(tmp_path / "d")), tmp_path) == expected


def test_long_files_are_read_in_blocks_without_extra_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "BLOCK_CHARACTERS", 10)
    text = "".join(f"line {i}\n" for i in range(50))
    (tmp_path / "a.txt").write_text(text)
    assert tokens_of(DataSection(source=str(tmp_path / "a.txt")), tmp_path) == [*text.encode(), END]


def test_tokens_are_cached_until_the_source_changes(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("first")
    data = DataSection(source=str(source))
    path = prepare_tokens(data, tmp_path)
    before = path.stat().st_mtime_ns
    assert prepare_tokens(data, tmp_path) == path
    assert path.stat().st_mtime_ns == before
    source.write_text("second")
    assert prepare_tokens(data, tmp_path) != path


def test_python_docs_make_a_dataset_that_all_pythons_carry(tmp_path: Path) -> None:
    counts: list[int] = []
    train, data = section(seq_len=128), DataSection(source="python-docs")
    loaded = load_dataset(data, train, tmp_path, progress=counts.append)
    assert counts == sorted(counts)
    assert counts[-1] == len(loaded.samples.tokens) > 300_000
    assert (loaded.vocab_size, loaded.samples.tokens.dtype.itemsize) == (257, 2)
    assert "statement" in ByteTokenizer().decode(loaded.samples.tokens[:100_000])
    assert isinstance(loaded.samples.tokens.base, np.memmap)
    assert load_dataset(data, train, tmp_path).fingerprint == loaded.fingerprint != ""


def test_a_saved_hugging_face_dataset_and_tokenizer(tmp_path: Path) -> None:
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    datasets.Dataset.from_dict({"body": ["a b", "b"]}).save_to_disk(tmp_path / "set")
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path / "words")
    data = DataSection(source=str(tmp_path / "set"), tokenizer=str(tmp_path / "words"), text_field="body")
    assert tokens_of(data, tmp_path) == [0, 1, 2, 1, 2]
    assert load_tokenizer(data.tokenizer).decode([0, 1]) == "a b"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "has no text"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1 has no text in field 'text', its text fields: 'body'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"a\.jsonl:2 has no text in field"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1 has no text in field 'text' but null; mend that record"),
        ("a.jsonl", b'{"text": \n', r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", b'["text"]\n', "must be a JSON object"),
        ("a.md", b"text\n", r"must end in \.txt, \.jsonl, \.csv or \.parquet, or \.gz of these"),
    ],
)
def test_bad_files_are_one_sentence_and_leave_nothing(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        prepare_tokens(DataSection(source=str(tmp_path / name)), tmp_path / "run")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]


def test_missing_files_and_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        prepare_tokens(DataSection(source=str(tmp_path / "no.txt")), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is no directory of a Hugging Face tokenizer"):
        load_tokenizer(str(tmp_path / "empty"))


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    data, train = DataSection(source="python-docs"), section()
    path = prepare_tokens(data, tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(data, train, tmp_path)


@pytest.mark.parametrize("changes", [{"seed": -1}, {"seed": 2**64}, {"eval_fraction": 1.1}, {"eval_fraction": -0.1}])
def test_a_seed_or_fraction_out_of_range_is_named(changes: dict[str, float]) -> None:
    with pytest.raises(DataError, match=r"seed=.* must be from 0 to 2\^64 - 1 and eval_fraction=.* from 0 to 1"):
        dataset(**changes)
