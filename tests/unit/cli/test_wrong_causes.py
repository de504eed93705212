"""A search that cannot be is refused by the limit, the size or the profile that forbids it, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from galvatron.core.hardware import Device, HardwareProfile
from galvatron.core.model_profile import ModelProfile
from galvatron.estimate import cluster, estimate_model, model_spec
from galvatron.plan import Plan
from unit.cli.test_search_verb import CARD, Verb

SEARCH = (*CARD, "--seq-len", "4096")
H100 = Device(
    name="NVIDIA H100 80GB HBM3",
    type="cuda",
    memory_bytes=84_900_000_000,
    matmul_flops_per_s={"bf16": 6.1e14, "fp32": 5e13},
)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "24"], "a memory size needs its unit, got '24'; write 24GiB or 24MiB"),
        (["--memory", "90G"], "90G is more than the 79.2 GiB that NVIDIA A100-SXM4-80GB has"),
        (["--fix", "zero=4"], "--fix zero='4' is no value of zero; give 0, 1, 2 or 3"),
        (["--max", "tp=0"], "--max tp='0' is no value of tp; give a whole number from 1 to"),
        (["--fix", "tp=4", "--max", "tp=2"], "tp=4 is fixed but at most 2 is allowed; change one"),
        (["--fix", "tp=4", "--forbid", "tp"], "tp=4 is fixed but tp is forbidden; leave one of"),
        (["--fix", "tp=3"], "tp=3 must divide world_size=8; choose 1, 2, 4, 8"),
        (["--fix", "head.tp=3"], "head.tp=3 must divide world_size=8; choose 1, 2, 4, 8"),
        (["--fix", "head.tp=4", "--max", "head.tp=2"], "head.tp=4 is fixed but at most 2 is allowed; change one"),
        (["--fix", "head.cp=4"], "--fix 'head.cp' is not known; did you mean 'head.tp'? choose from schedule"),
        (["--fix", "head.tp=4", "--forbid", "tp"], "head.tp=4 is fixed but tp is forbidden; leave one of"),
        (["--fix", "tpp=2"], "--fix 'tpp' is not known; did you mean 'tp'? choose from schedule"),
        (["--forbid", "recomptue"], "--forbid 'recomptue' is not known; did you mean 'recompute'?"),
        (["--max", "schedule=2"], "--max schedule='2' needs a dimension that counts"),
        (
            ["--fix", "dp_shard=8", "--forbid", "zero"],
            "fix dp_shard=8 and forbid zero together leave no plan of llama2-7b at seq_len=4096, global_batch_size=64",
        ),
        (
            ["--space", "dp"],
            "no plan of space=dp fits in 79.2 GiB a device: the smallest (pp=1, num_microbatches=8; dp_replicate 8, "
            "recompute full) needs ",
        ),
        (["--space", "dp", "--fix", "tp=2"], "fix tp=2 and space dp together leave no plan of"),
        (["--global-batch-size", "1000000000000"], "must be from 1 to 16,777,216, got [1000000000"),
        (["--global-batch-size", "1" + "0" * 20], "a global batch is a number of sequences, a range"),
        (["--cluster", "a100:9999999x9999999"], "a cluster has at most 1,048,576 devices, got"),
        (["--link", "inter=" + "9" * 400 + "GB/s"], "with a rate from 1 kB/s to 1 PB/s"),
    ],
)
def test_the_sentence_names_what_forbids_it(
    galvatron: Verb, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert galvatron(*SEARCH, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ["--memory", "70 gib", "--fix", "TP=8", "--model", "meta-llama/Llama-2-7b-hf"],
        ["--cluster", "A100-80GB:8", "--fix", "dp-shard=1", "--max", "num-microbatches=8", "--forbid", "Recompute"],
        ["--space", "All", "--fix", "cp=2", "--fix", "schedule=1F1B"],
    ],
)
def test_words_are_taken_in_any_case_and_with_dashes(galvatron: Verb, options: list[str]) -> None:
    assert galvatron(*SEARCH, *options, "--no-baselines", "--json") == 0


def measured(device: Device = H100) -> HardwareProfile:
    """Eight devices as ``galvatron profile hardware`` writes them."""
    profile = cluster("h100:8")
    return profile.model_copy(update={"device": device, "origin": "measured"})


def test_a_card_is_planned_on_a_measured_cluster(galvatron: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    measured().save("hardware.json")
    assert galvatron(*SEARCH, "--cluster", "hardware.json", "--no-baselines", "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert out["search"]["origins"] == {"model": "estimated", "hardware": "measured"}
    assert out["predicted"]["memory_limit_bytes"] == H100.memory_bytes
    slower = H100.model_copy(update={"matmul_flops_per_s": {"bf16": 3.05e14}})
    measured(slower).save("hardware.json")
    assert galvatron(*SEARCH, "--cluster", "hardware.json", "--no-baselines", "--json") == 0
    twice = json.loads(capsys.readouterr().out)["predicted"]["step_time_s"] / out["predicted"]["step_time_s"]
    assert 1.7 < twice < 2.1  # half the measured rate


def test_a_card_is_planned_on_devices_that_no_preset_knows(galvatron: Verb) -> None:
    xpu = Device(name="Some GPU", type="cuda", memory_bytes=84_900_000_000, matmul_flops_per_s={"bf16": 4e14})
    measured(xpu).save("hardware.json")
    assert galvatron(*SEARCH, "--cluster", "hardware.json", "--no-baselines", "--json") == 0
    assert Plan.load("plan.json").world_size == 8


def profiled(device: str) -> ModelProfile:
    """A model as ``galvatron profile model`` writes it on ``device``."""
    profile = estimate_model(model_spec("llama2-7b"), "h100", seq_len=4096, tp_degrees=[1, 2, 4, 8])
    return profile.model_copy(update={"device": device, "origin": "measured"})


def test_a_model_profiled_on_another_device_is_refused(galvatron: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    profiled("Intel Xeon").save("model.json")
    assert galvatron(*SEARCH, "--model", "model.json", "--cluster", "h100:8") == 2
    said = "the model profile is of Intel Xeon but the cluster's devices are NVIDIA H100 80GB HBM3; profile the model"
    assert said in capsys.readouterr().err
    profiled("NVIDIA H100 80GB HBM3").save("model.json")
    command = (*SEARCH, "--model", "model.json", "--cluster", "h100:8", "--no-baselines", "--json")
    assert galvatron(*command) == 0


def test_a_batch_whose_bytes_cannot_be_counted_is_refused(galvatron: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    profile = profiled("NVIDIA H100 80GB HBM3")
    huge = [sample.model_copy(update={"bytes_per_sequence": 2**50}) for sample in profile.activations]
    profile.model_copy(update={"activations": tuple(huge)}).save("model.json")
    assert galvatron(*SEARCH, "--model", "model.json", "--cluster", "h100:8") == 2
    assert "64 sequences of llama2-7b would take more than 1,152,921,504,606,846,976 bytes" in capsys.readouterr().err
