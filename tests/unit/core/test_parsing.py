"""Texts that are no data, and values that are out of any machine's range: one sentence each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from galvatron.core.errors import ConfigError, ProfileError
from galvatron.core.hardware import HardwareProfile
from galvatron.core.job import Job
from galvatron.core.parsing import is_file, parse_json, parse_toml, read_text
from galvatron.core.units import parse_bytes, parse_seconds
from galvatron.core.words import printable
from unit.core.test_records import HARDWARE, JOB


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "nests too deeply"),
        ("[" + "9" * 5000 + "]", "a number has thousands of digits"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1e999]", "'1e999' is too large a number"),
        ('{"tp": 1, "tp": 2}', "the key 'tp' is given twice"),
        ('"\\ud800"', "half a character"),
    ],
)
def test_what_json_cannot_hold(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^it is not JSON \(.*{says}.*\); mend it$"):
        parse_json(text, "it", ConfigError, "mend it")


@pytest.mark.parametrize(
    ("text", "says"),
    [("a = " + "9" * 5000, "thousands of digits"), ("a = " + "[" * 5000, "nests too deeply"), ("a", "Expected '='")],
)
def test_what_toml_cannot_hold(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^it is not TOML: .*{says}.*; mend that line$"):
        parse_toml(text, "it", ConfigError)


def test_plain_data_is_what_json_says() -> None:
    data = {"a": [1, -2.5e-3, "é\\u00e9", None, True], "b": {"c": 10**30}}
    assert parse_json(json.dumps(data), "it", ConfigError, "") == data


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "h.json").write_text(HARDWARE.to_json(), encoding="utf-8-sig")
    assert HardwareProfile.load(tmp_path / "h.json") == HARDWARE


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
def test_what_can_be_no_path(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_text(path, ConfigError)
    assert not is_file(path)


def test_what_is_no_text_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\x93NUMPY\xff")
    with pytest.raises(ConfigError, match=r"a\.json is no text in UTF-8; give a text file, not a binary one$"):
        read_text(tmp_path / "a.json", ConfigError)
    with pytest.raises(ConfigError, match=r"is a directory; give a file$"):
        read_text(tmp_path, ConfigError)
    with pytest.raises(ConfigError, match=r"cannot be read: Not a directory; check the path and its permissions$"):
        read_text(tmp_path / "a.json" / "b", ConfigError)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24G", 24 * 2**30),
        ("24 gib", 24 * 2**30),
        ("24Gi", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("24gb", 24 * 10**9),
        ("80 Gb", 80 * 10**9),
        ("512M", 2**29),
        ("1.5TiB", 3 * 2**39),
        ("100B", 100),
        ("25769803776", 24 * 2**30),
    ],
)
def test_sizes_in_any_case(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("24", "needs its unit, got '24'; write 24GiB or 24MiB"),
        ("0GiB", "from 1 byte to"),
        ("0", "from 1 byte to"),
        ("9" * 20 + "TiB", "from 1 byte to"),
        ("9" * 500, "a number with a unit, got '999"),
        ("-1GiB", "a number with a unit"),
        ("nanGiB", "a number with a unit"),
        ("٢GiB", "a number with a unit"),
    ],
)
def test_sizes_that_are_none(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("1.5 m", 90), ("2h", 7200)])
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["30", "0s", "-1s", "infs", "1d", "", "9" * 500 + "s"])
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="a time is a positive number with a unit"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"world_size": 2', '"world_size": "2"'),
        ('"world_size": 2', '"world_size": true'),
        ('"world_size": 2', '"world_size": 2.0'),
        ('"world_size": 2', '"world_size": 0'),
        ('"world_size": 2', '"world_size": 100000000000000000000'),
        ('"latency_s": 1e-05', '"latency_s": -1e-05'),
        ('"latency_s": 1e-05', '"latency_s": 1e300'),
        ('"compute_slowdown": 1.5', '"compute_slowdown": 0.5'),
        ('"memory_bytes": 1073741824', '"memory_bytes": 1e9'),
    ],
)
def test_no_number_is_converted_or_out_of_range(old: str, new: str) -> None:
    text = HARDWARE.to_json()
    assert old in text
    with pytest.raises(ProfileError, match=r"it: \S+: must be .* \(got .*\)$"):
        HardwareProfile.from_json(text.replace(old, new), "it")


def test_all_defects_are_named_at_once(tmp_path: Path) -> None:
    text = JOB.replace("[train]", "[trian]").replace('path = "config.json"', 'paths = "config.json"')
    (tmp_path / "job.toml").write_text(text + "[search]\nmax-tp = 2\n")
    with pytest.raises(ConfigError) as caught:
        Job.load(tmp_path / "job.toml")
    said = str(caught.value)
    for defect in (
        "model.paths: unknown key; did you mean 'path'? known here: freeze, ",
        "search.max-tp: unknown key; did you mean 'max_tp'? known here: max_tp, memory, num_microbatches, pp",
        "trian: unknown key; did you mean 'train'? known here:",
        "model.path: must be given",
        "train: must be given",
    ):
        assert defect in said
    assert "\n" not in said


def test_many_defects_are_counted() -> None:
    text = HARDWARE.to_json().replace('"op"', '"ops"').replace('"world_size": 2,', "")
    defects = ", ".join(f'"x{i}": {i}' for i in range(20))
    with pytest.raises(ProfileError, match=r"; and 15 more$"):
        HardwareProfile.from_json(text.replace("{", "{" + defects + ",", 1))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("num_steps = 10", 'num_steps = "10"', r"train.num_steps: .*valid integer \(got '10'\)"),
        ("num_steps = 10", "num_steps = true", r"train.num_steps: .*valid integer \(got True\)"),
        ("num_steps = 10", "num_steps = 10\ntensorboard = 1", r"train.tensorboard: .*valid boolean \(got 1\)"),
        ("config.json", "x" * 300, r"model.path: a path or name has at most 255 bytes a part and no null byte"),
        ("python-docs", "a\\u0000b", r"data.source: a path or name has at most 255 bytes a part and no null byte"),
        ("num_steps = 10", "num_steps = 10\nlr = inf", r"train.lr: .*finite number \(got inf\)"),
        ("num_steps = 10", "num_steps = 10\nweight_decay = nan", r"train.weight_decay: .*\(got nan\)"),
        ("global_batch_size = 8", "global_batch_size = 1_000_000_000_000", r"train.global_batch_size: .*16777216"),
        ("seq_len = 64", "seq_len = 100_000_000_000_000_000_000", r"train.seq_len: .*134217728"),
    ],
)
def test_no_setting_of_a_job_is_converted(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in JOB
    (tmp_path / "job.toml").write_text(JOB.replace(old, new))
    with pytest.raises(ConfigError, match=says):
        Job.load(tmp_path / "job.toml")


def test_what_no_terminal_shows_is_written_out() -> None:
    assert printable("a\x01b\né") == r"a\x01b\né"
