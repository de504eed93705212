"""``galvatron import`` and ``galvatron plan`` on made-up files."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from galvatron.core.hardware import HardwareProfile
from galvatron.core.model_profile import ModelProfile
from galvatron.cost import predict
from galvatron.plan import LayerStrategy, Plan
from unit.exchange.hetu_fixtures import SEQ_LEN, SPEC, hardware_files, one_kind_files
from unit.profiles import make_hardware, make_model

ZERO3 = LayerStrategy(dp_shard=4, zero=3)
PLAN = Plan(
    model="toy",
    world_size=4,
    layers_per_stage=(2,),
    global_batch_size=8,
    seq_len=SEQ_LEN,
    precision="bf16",
    embedding=ZERO3,
    layers=(ZERO3,) * 2,
    head=ZERO3,
)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    tmp_path: Path,
    galvatron: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run the command line in a folder with a plan; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    PLAN.save("plan.json")

    def call(*arguments: str) -> tuple[int, str, str]:
        code, printed = galvatron(*arguments), capsys.readouterr()
        return code, printed.out, printed.err

    return call


def import_arguments(model: str = "shapes.json", out: str = "profiles") -> list[str]:
    computation, memory = one_kind_files(Path("files"))
    hardware_files(Path("hardware"))
    make_model(SPEC).save("shapes.json")
    paths = ["--computation", str(computation), "--memory", str(memory), "--hardware", "hardware"]
    return ["import", "hetu", *paths, "--model", model, "--out", out]


def test_import_writes_both_profiles(run: Run) -> None:
    code, out, _ = run(*import_arguments(), "--device-memory", "80GB")
    assert code == 0
    model, hardware = ModelProfile.load("profiles/model.json"), HardwareProfile.load("profiles/hardware.json")
    assert (model.spec, model.origin, hardware.origin) == (SPEC, "imported", "imported")
    assert (hardware.world_size, hardware.device.memory_bytes) == (4, 80 * 10**9)
    assert "are Hetu-Galvatron's assumptions, not measured" in out


def test_imported_profiles_predict_a_plan(run: Run) -> None:
    run(*import_arguments())
    prediction = predict(PLAN, ModelProfile.load("profiles/model.json"), HardwareProfile.load("profiles/hardware.json"))
    # 2 samples a rank: two layers of 4 ms and a head of 3 ms, and their backwards
    assert prediction.parts_s["compute"] == pytest.approx(3 * (2 * 4e-3 + 3e-3))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--nodes", "2"], "found nodes x devices: 1 x 4; choose one by --nodes and --gpus-per-node"),
        (["--seq-len", "64"], "but was measured at 128"),
        (["--device-memory", "lots"], "a memory size is a number with a unit"),
        (["--memory", "none.json"], "none.json does not exist"),
        (["--out", "plan.json"], "must be a folder to write files into but plan.json is a file"),
    ],
)
def test_a_wrong_import_is_one_sentence_and_writes_nothing(run: Run, extra: list[str], message: str) -> None:
    code, _, error = run(*import_arguments(), *extra)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not Path("profiles").exists()


def test_export_prints_or_writes(run: Run) -> None:
    code, out, _ = run("plan", "export", "plan.json", "--format", "megatron")
    assert code == 0
    assert out.startswith("--tensor-model-parallel-size 1 ")
    assert out.endswith("--seq-length 128 --bf16\n")
    code, out, _ = run("plan", "export", "plan.json", "--format", "torchtitan", "--out", "titan.toml")
    assert out == "wrote titan.toml\n"
    assert tomllib.loads(Path("titan.toml").read_text())["parallelism"]["data_parallel_shard_degree"] == 4


def test_export_and_import_give_the_plan_back(run: Run) -> None:
    run("plan", "export", "plan.json", "--format", "hetu", "--out", "hetu.json")
    make_model(SPEC).save("model.json")
    place = ("--world-size", "4", "--seq-len", str(SEQ_LEN), "--out", "back.json")
    code, out, _ = run("plan", "import", "hetu.json", "--format", "hetu", *place, "--model", "model.json")
    assert code == 0
    assert "layers 0-1: dp_shard 4, zero 3" in out
    assert Plan.load("back.json") == PLAN
    assert run("plan", "diff", "plan.json", "back.json")[1] == "the plans are equal\n"


def test_what_cannot_be_exported_or_imported_is_one_sentence(run: Run) -> None:
    mixed = PLAN.model_copy(update={"layers": (ZERO3, LayerStrategy(tp=4))})
    mixed.save("mixed.json")
    code, out, error = run("plan", "export", "mixed.json", "--format", "torchtitan", "--out", "mixed.toml")
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert "here they are layer 0 (dp_shard 4, zero 3) and layer 1 (tp 4)" in error
    assert not Path("mixed.toml").exists()
    run("plan", "export", "plan.json", "--format", "hetu", "--out", "hetu.json")
    Path("hetu.json").write_text(json.dumps(json.loads(Path("hetu.json").read_text()) | {"chunks": 3}))
    code, _, error = run("plan", "import", "hetu.json", "--world-size", "4", "--seq-len", "8", "--out", "no.json")
    assert code == 2
    assert "hetu.json: chunks=3 must divide global_bsz=8" in error
    assert not Path("no.json").exists()


def test_show_describes_and_explains(run: Run) -> None:
    assert run("plan", "show", "plan.json")[1] == PLAN.describe() + "\n"
    model = make_model(SPEC, seq_len=SEQ_LEN)
    plan = PLAN.model_copy(update={"precision": "fp32"})
    plan.model_copy(update={"prediction": predict(plan, model, make_hardware(4))}).save("predicted.json")
    out = run("plan", "show", "predicted.json")[1]
    assert "\nStep time " in out
    assert "Memory, fullest rank of each stage (predicted)" in out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers_per_stage": (3,)}, "layers_per_stage"),
        ({"num_microbatches": 3}, "num_microbatches=3"),
        ({"head": LayerStrategy(dp_shard=8, zero=3)}, "head: "),
    ],
)
def test_a_plan_that_cannot_be_is_not_shown(run: Run, changed: dict[str, object], message: str) -> None:
    PLAN.model_copy(update=changed).save("wrong.json")
    for verb in (["show", "wrong.json"], ["diff", "plan.json", "wrong.json"]):
        code, out, err = run("plan", *verb)
        assert (code, out) == (2, "")
        assert message in err


@pytest.mark.parametrize("verb", ["import hetu", "plan show", "plan diff", "plan export", "plan import"])
def test_help_has_examples(run: Run, verb: str) -> None:
    code, out, _ = run(*verb.split(), "--help")
    assert code == 0
    assert f"Examples:\n    galvatron {verb} " in out
