"""Files: what is written is read back, and every defect is one clear sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from galvatron.core.errors import ConfigError, PlanError, ProfileError
from galvatron.core.hardware import Device, HardwareProfile, Link, Overlap
from galvatron.core.job import Job
from galvatron.core.units import format_bytes, format_seconds, parse_bytes

HARDWARE = HardwareProfile(
    device=Device(name="toy", type="cpu", memory_bytes=2**30, matmul_flops_per_s={"fp32": 1e9}),
    world_size=2,
    devices_per_node=2,
    backend="gloo",
    links=(Link(op="p2p", size=2, stride=1, latency_s=1e-5, seconds_per_byte=1e-9),),
    overlap=Overlap(compute_slowdown=1.5, communication_slowdown=1.2),
)
JOB = """
[model]
path = "config.json"
[data]
source = "python-docs"
[train]
global_batch_size = 8
seq_len = 64
num_steps = 10
"""


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    HARDWARE.save(tmp_path / "deep" / "hardware.json")
    assert HardwareProfile.load(tmp_path / "deep" / "hardware.json") == HARDWARE
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["hardware.json"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 1', '"version": 7', "has version 7; this galvatron reads version 1"),
        ("galvatron.hardware", "galvatron.plan", 'lacks "format": "galvatron.hardware"'),
        ('"world_size": 2', '"world_sizes": 2', "world_size"),
        ('"world_size": 2', '"world_size": "two"', "got 'two'"),
        ('"latency_s": 1e-05', '"latency_ms": 0.01', "latency"),
        ("{", "", "is not JSON"),
    ],
)
def test_a_defect_is_one_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = HARDWARE.to_json()
    assert old in text
    (tmp_path / "h.json").write_text(text.replace(old, new, 1))
    with pytest.raises(ProfileError, match=message) as caught:
        HardwareProfile.load(tmp_path / "h.json")
    assert "\n" not in str(caught.value)


def test_an_unknown_key_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB + "learning_rate = 1\n")
    with pytest.raises(ConfigError, match=r"train.learning_rate: unknown key; known here: .*lr.*"):
        Job.load(tmp_path / "job.toml")


def test_paths_of_a_job_are_relative_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "job.toml").write_text(JOB)
    job = Job.load(tmp_path / "job.toml")
    assert job.model.path == str(tmp_path / "config.json")
    assert job.data.source == "python-docs"


def test_a_missing_file_and_a_bad_unit() -> None:
    with pytest.raises(PlanError, match="does not exist"):
        __import__("galvatron.plan", fromlist=["Plan"]).Plan.load("/nowhere/plan.json")
    with pytest.raises(ConfigError, match="write 512MiB"):
        parse_bytes("12 parsecs")


def test_units_for_people() -> None:
    assert parse_bytes("36GiB") == 36 * 2**30
    assert parse_bytes("1.5 KB") == 1500
    assert format_bytes(1536) == "1.5 KiB"
    assert format_seconds(0.0123) == "12.3 ms"
    with pytest.raises(ProfileError, match="no all_gather over groups of size=2"):
        HARDWARE.link("all_gather", 2, 1)
