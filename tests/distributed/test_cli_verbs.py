"""The verbs that need processes, on a model that trains in seconds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from exported import evaluated_by_transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from galvatron.cli.lock import locked
from galvatron.core.job import Job
from galvatron.models import load_config
from galvatron.plan import LayerStrategy, Plan
from galvatron.plan.plan import Prediction, StagePrediction
from galvatron.train import read_metrics
from jobs import CONFIG, job_text

JOB = job_text(lr=1e-2, save_every=2)
SHARDED = LayerStrategy(dp_shard=2, zero=3)
CUT = LayerStrategy(tp=2)
MIXED = Plan(
    model="tiny",
    world_size=2,
    layers_per_stage=(2,),
    global_batch_size=4,
    seq_len=16,
    embedding=SHARDED,
    layers=(SHARDED, CUT),
    head=CUT,
)
PIPELINE = MIXED.model_copy(
    update={
        "layers_per_stage": (1, 1),
        "num_microbatches": 2,
        "embedding": LayerStrategy(),
        "layers": (LayerStrategy(), LayerStrategy(recompute="full")),
        "head": LayerStrategy(),
    }
)

Verb = Callable[..., int]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    (tmp_path / "job.toml").write_text(JOB)
    MIXED.save(tmp_path / "mixed.json")
    PIPELINE.save(tmp_path / "pipeline.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def losses(run: str) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(Path(run) / "metrics.jsonl") if "loss" in row}


def test_train_resume_under_another_plan_and_export(
    folder: Path, galvatron: Verb, capfd: pytest.CaptureFixture[str]
) -> None:
    stage = StagePrediction.model_validate(dict.fromkeys(StagePrediction.model_fields, 1))
    promised = Prediction(step_time_s=1.0, parts_s={}, stages=(stage, stage), compiled=True)
    predicted = PIPELINE.model_copy(update={"prediction": promised})
    predicted.save("pipeline.json")
    assert galvatron("train", "job.toml", "--plan", "mixed.json", "--run-dir", "whole") == 0
    assert "predicts" not in capfd.readouterr().out
    assert galvatron("train", "job.toml", "--plan", "pipeline.json", "--resume", "whole/checkpoints/step-000002") == 0
    assert (
        " ".join(capfd.readouterr().out.split()).count("not compiled here but compiled in what the plan predicts") == 1
    )
    whole, resumed = losses("whole"), losses("runs/job")
    assert list(whole) == [1, 2, 3, 4]
    assert list(resumed) == [3, 4]
    assert resumed[4] == pytest.approx(whole[4], rel=1e-4)
    assert Plan.load("runs/job/plan.json") == predicted

    assert galvatron("checkpoint", "verify", "whole") == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines if not line.startswith(" ")] == [
        f"whole/checkpoints/step-00000{step} is whole: step {step} by 2 processes" for step in (2, 4)
    ]
    assert galvatron("convert", "to-hf", "whole", "hf") == 0
    assert galvatron("convert", "from-hf", "hf", "again") == 0
    first, second = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("hf", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert AutoTokenizer.from_pretrained("hf")("fox")["input_ids"] == list(b"fox")


def test_one_command_begins_goes_on_and_ends(folder: Path, galvatron: Verb, capfd: pytest.CaptureFixture[str]) -> None:
    run, command = folder / "runs/job", ("train", "job.toml", "--plan", "mixed.json")
    assert galvatron(*command, "--resume", "latest") == 2, "nothing has begun"
    assert "start without resuming" in capfd.readouterr().err
    assert not run.exists()

    assert galvatron(*command) == 0
    whole = losses("runs/job")
    shutil.rmtree(run / "checkpoints")  # as if killed before the first save
    for more in ((), ("--resume", "latest")):
        assert galvatron(*command, *more) == 0
        assert losses("runs/job") == whole
        shutil.rmtree(run / "checkpoints/step-000004")
        (run / "checkpoints/latest").write_text("step-000002\n")  # as if killed before the last
        assert galvatron(*command, *more) == 0
        assert losses("runs/job") == whole
        shutil.rmtree(run / "checkpoints")

    assert galvatron(*command) == 0
    capfd.readouterr()
    assert galvatron(*command) == 0
    assert "runs/job has done 4 steps already" in capfd.readouterr().out
    assert galvatron("run", "job.toml", "--nproc", "1") == 0, "other processes than before: nothing to measure for"
    assert "runs/job has done 4 steps already" in capfd.readouterr().out
    assert not (run / "hardware.json").exists()

    fork = (*command, "--run-dir", "fork", "--resume", "runs/job/checkpoints/step-000002")
    assert galvatron(*fork) == 0
    os.utime(folder / "fork/checkpoints/step-000004/state.json", (0, 0))
    assert galvatron(*fork) == 0, "it goes on from its own checkpoint, not from the other run's again"
    assert (folder / "fork/checkpoints/step-000004/state.json").stat().st_mtime == 0
    assert {step: whole[step] for step in (3, 4)} == losses("fork")


def test_what_is_refused_changes_nothing(folder: Path, galvatron: Verb, capfd: pytest.CaptureFixture[str]) -> None:
    assert galvatron("train", "job.toml", "--plan", "mixed.json") == 0
    for name in ("hardware.json", "model.json"):
        (folder / "runs/job" / name).write_text("kept")  # a profile is neither read nor written where a run is refused
    before = {path: path.read_bytes() for path in (folder / "runs/job").rglob("*") if path.is_file()}
    (folder / "changed.toml").write_text(JOB.replace("seq_len = 16", "seq_len = 16\nseed = 1"))
    (folder / "long.toml").write_text(JOB.replace("seq_len = 16", "seq_len = 128"))
    run_dir = ("--run-dir", "runs/job")
    for words, arguments in {
        "already holds a run under another plan": ("train", "job.toml", "--plan", "pipeline.json"),
        "was trained with seed=0": ("train", "changed.toml", "--plan", "mixed.json", *run_dir),
        "was trained with seed=0 but": ("run", "changed.toml", *run_dir),
        "train.seq_len=128 must not exceed": ("run", "long.toml", *run_dir),
    }.items():
        capfd.readouterr()
        assert galvatron(*arguments) == 2
        output = capfd.readouterr()
        assert words in output.err
        assert output.err.count("\n") == 1
        assert output.out == ""
        assert before == {path: path.read_bytes() for path in (folder / "runs/job").rglob("*") if path.is_file()}


def test_frozen_parameters_stay_and_have_no_moments(
    folder: Path, galvatron: Verb, capfd: pytest.CaptureFixture[str]
) -> None:
    freeze = ("model.embed_tokens.*", "model.layers.0.*")
    job = JOB.replace('"config.json"', f'"config.json"\nfreeze = {json.dumps(freeze)}')
    (folder / "frozen.toml").write_text(job)
    (folder / "wrong.toml").write_text(job.replace("layers.0.", "layer.0."))
    plan = ("--plan", "mixed.json")
    assert galvatron("train", "wrong.toml", *plan) == 2
    assert re.search(r"freeze: 'model\.layer\.0\.\*' matches no parameter .*model\.layers\.0", capfd.readouterr().err)
    assert not (folder / "runs/wrong").exists()

    assert galvatron("train", "frozen.toml", *plan) == 0
    found = losses("runs/frozen")
    assert found[4] < found[1]
    for step in (2, 4):
        assert galvatron("convert", "to-hf", f"runs/frozen/checkpoints/step-00000{step}", f"hf-{step}") == 0
    early, late = (AutoModelForCausalLM.from_pretrained(f"hf-{step}").state_dict() for step in (2, 4))
    same = {name for name in early if torch.equal(early[name], late[name])}
    assert same == {name for name in early if any(fnmatchcase(name, pattern) for pattern in freeze)}

    (folder / "thawed.toml").write_text(JOB.replace("num_steps = 4", "num_steps = 5"))
    capfd.readouterr()
    assert galvatron("train", "thawed.toml", *plan, "--run-dir", "runs/frozen") == 2
    assert "freeze" in capfd.readouterr().err


def test_tokens_are_made_by_a_verb_of_their_own(
    folder: Path, galvatron: Verb, capfd: pytest.CaptureFixture[str]
) -> None:
    assert galvatron("data", "prepare", "job.toml", "--run-dir", "first") == 0
    (tokens,) = (folder / "first/data").glob("*.npy")
    assert f"first/data/{tokens.name} is ready" in capfd.readouterr().out
    text = json.dumps({"text": "a" * 100})
    records = f'{text}\n{{"text": null}}\n{text}\n{{}}\n'
    (folder / "bad.jsonl").write_text(records)
    (folder / "bad.toml").write_text(JOB.replace('"text.txt"', '"bad.jsonl"\nskip_bad_records = true'))
    assert galvatron("data", "prepare", "bad.toml") == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "2 bad records of" in said
    assert "bad.jsonl:2 has no text in field" in said

    made = tokens.stat().st_mtime_ns
    assert galvatron("train", "job.toml", "--plan", "mixed.json", "--run-dir", "first") == 0
    assert tokens.stat().st_mtime_ns == made


def test_two_commands_in_one_run_directory(folder: Path, galvatron: Verb, capfd: pytest.CaptureFixture[str]) -> None:
    with locked(folder / "runs/job"):
        for arguments in (
            ("train", "job.toml", "--plan", "mixed.json"),
            ("run", "job.toml"),
            ("data", "prepare", "job.toml"),
        ):
            assert galvatron(*arguments) == 2
            assert re.fullmatch(
                rf"galvatron: runs/job is in use by process {os.getpid()} on .* since .*\n", capfd.readouterr().err
            )


@pytest.mark.parametrize("damage", ["truncated", "64 flipped bytes"])
def test_a_damaged_checkpoint_is_one_sentence(
    folder: Path, galvatron: Verb, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    assert galvatron("train", "job.toml", "--plan", "mixed.json") == 0
    checkpoint = folder / "runs/job/checkpoints/step-000004"
    largest = max(checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    start = len(content) // 2  # among the first layer's and the head's weights, well before random states
    flipped = bytes(byte ^ 0xFF for byte in content[start : start + 64])
    largest.write_bytes(content[:start] + (flipped + content[start + 64 :] if damage != "truncated" else b""))
    capfd.readouterr()
    for arguments in (
        ("train", "job.toml", "--plan", "mixed.json", "--resume", str(checkpoint), "--run-dir", "other"),
        ("checkpoint", "verify", str(checkpoint)),
        ("checkpoint", "verify", "runs/job"),
    ):
        assert galvatron(*arguments) == 2
        error = capfd.readouterr().err
        assert error.startswith("galvatron: ")
        assert largest.name in error
        assert error.count("\n") == 1
    assert not (folder / "other" / "checkpoints").exists()


def test_weights_of_another_model_are_refused_before_anything_is_done(
    folder: Path, galvatron: Verb, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "model").mkdir()
    save_file({"lm_head.weight": torch.zeros(257, 32)}, folder / "model/model.safetensors")
    (folder / "model/config.json").write_text(json.dumps(CONFIG))
    (folder / "job.toml").write_text(JOB.replace('path = "config.json"', 'path = "model"\nweights = true'))
    for verb in (("run", "job.toml"), ("train", "job.toml", "--plan", "mixed.json")):
        assert galvatron(*verb) == 2
        error = capfd.readouterr().err
        assert "lacks 20 of the model's 21 parameters: model.embed_tokens.weight, " in error
        assert error.count("\n") == 1
    assert not (folder / "runs/job/checkpoints").exists()

    AutoModelForCausalLM.from_config(load_config(folder / "config.json")).save_pretrained(folder / "model")
    tensors = load_file(folder / "model/model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(1)
    save_file(tensors, folder / "model/model.safetensors")
    assert galvatron("train", "job.toml", "--plan", "mixed.json") == 0
    output = capfd.readouterr()
    said = "holds 1 tensor that the model lacks and that are left out: model.layers.2.mlp.up_proj.weight"
    assert " ".join((output.out + output.err).split()).count(said) == 1


def test_a_plan_for_another_job_is_one_sentence(
    folder: Path, galvatron: Verb, capfd: pytest.CaptureFixture[str]
) -> None:
    MIXED.model_copy(update={"seq_len": 32}).save(folder / "longer.json")
    assert galvatron("train", "job.toml", "--plan", "longer.json") == 2
    error = capfd.readouterr().err
    assert "the plan has seq_len=32 but the job has seq_len=16" in error
    assert error.count("\n") == 1
    assert not list(folder.rglob("plan.json"))


def test_torchrun_s_world_is_joined(folder: Path) -> None:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "galvatron",
    ]
    done = subprocess.run(
        [*launcher, "train", "job.toml", "--plan", "mixed.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(losses("runs/job")) == [1, 2, 3, 4]
    assert done.stdout.count("step     4  loss") == 1, "rank 0 alone is heard"


@pytest.mark.slow
def test_run_does_it_all_and_goes_on_where_it_ended(
    folder: Path, galvatron: Verb, capfd: pytest.CaptureFixture[str]
) -> None:
    extra = '[resume]\nat_step = 2\n[generate]\nprompt = "The quick"\nmax_new_tokens = 4\n'
    (folder / "job.toml").write_text(JOB + extra)
    assert galvatron("run", "job.toml") == 0
    run = folder / "runs/job"
    assert {path.name for path in run.iterdir()} >= {"hardware.json", "model.json", "plan.json", "plan-resumed.json"}
    assert list(losses("runs/job")) == [1, 2, 3, 4]
    assert (run / "exported/step-000004/model.safetensors").exists()
    assert Plan.load(run / "plan.json").layers != Plan.load(run / "plan-resumed.json").layers
    assert "step time, predicted" in capfd.readouterr().out

    whole = losses("runs/job")
    assert galvatron("run", "job.toml") == 0
    out = capfd.readouterr().out
    assert "has done 4 steps already" in out
    assert "Profile" not in out
    shutil.rmtree(run / "checkpoints/step-000004")
    (run / "checkpoints/latest").write_text("step-000002\n")
    assert galvatron("run", "job.toml") == 0
    out = capfd.readouterr().out
    assert "hardware.json is kept" in out
    assert "has done 2 steps already" in out
    assert losses("runs/job") == whole


def test_a_run_that_would_not_go_on_is_refused_before_anything_is_done(
    folder: Path, galvatron: Verb, capfd: pytest.CaptureFixture[str]
) -> None:
    assert galvatron("train", "job.toml", "--plan", "mixed.json") == 0
    run = folder / "runs/job"
    assert json.loads((run / "run.json").read_text())["data"]["tokenizer"] == "bytes"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    config = json.dumps({**CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    changed = [
        (JOB.replace("num_steps = 4", "num_steps = 6\nseed = 1"), json.dumps(CONFIG), "seed=1"),
        (JOB.replace('"text.txt"', '"text.txt"\neval_fraction = 0.1'), json.dumps(CONFIG), "eval_fraction=0.1"),
        (JOB, config, "'rope_theta': 500000.0"),
    ]
    for job, model, words in changed:
        (folder / "job.toml").write_text(job)
        (folder / "config.json").write_text(model)
        for verb in (("run", "job.toml"), ("train", "job.toml", "--plan", "pipeline.json", "--resume", "latest")):
            capfd.readouterr()
            assert galvatron(*verb) == 2
            output = capfd.readouterr()
            assert words in output.err.split("but the job has")[1]
            assert output.err.count("\n") == 1
            assert output.out == ""
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    (folder / "job.toml").write_text(JOB.replace("num_steps = 4", "num_steps = 8"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert galvatron("train", "job.toml", "--plan", "mixed.json", "--resume", "latest") == 0
    said = "num_steps was 4 and is 8: the learning rate of step 5 is 0.005 in place of 0"
    assert capfd.readouterr().out.count(said) == 1
    assert list(losses("runs/job")) == list(range(1, 9))


CHAT = """[data]
source = "chat.jsonl"
records = "conversations"
chat_template = "chat.jinja"
"""


def test_answers_are_learnt_from_conversations_and_validated_on_others(
    folder: Path, galvatron: Verb, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    lines = [json.dumps({"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]})] * 40
    (folder / "chat.jsonl").write_text("\n".join(lines))
    (folder / "other.jsonl").write_text("\n".join(lines[:3]))
    (folder / "chat.toml").write_text(JOB.replace('[data]\nsource = "text.txt"\n', CHAT))
    run = ("train", "chat.toml", "--plan", "mixed.json", "--run-dir", "chat", "--validation", "other.jsonl")
    assert galvatron(*run) == 0
    assert "validation loss" in capfd.readouterr().out
    rows = read_metrics(folder / "chat" / "metrics.jsonl")
    assert [row["step"] for row in rows if "validation_loss" in row] == [4]
    assert not any("eval_loss" in row for row in rows)

    (folder / "other.jsonl").write_text('{"messages": [{"role": "user", "content": "ab"}]}\n')
    assert galvatron("data", "prepare", "chat.toml", "--validation", "other.jsonl") == 2
    assert "other.jsonl:1 has no message of the role 'assistant'" in " ".join(capfd.readouterr().err.split())


VIT = {
    "model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 16, "patch_size": 8,
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
}  # fmt: skip


def test_images_are_learnt_and_classes_exported_by_name(folder: Path, galvatron: Verb) -> None:
    from PIL import Image
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "processor")
    for number in range(20):
        path = folder / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (250 * (number % 2), 0, 99)).save(path)
    (folder / "config.json").write_text(json.dumps(VIT))
    data = 'source = "images"\nprocessor = "processor"\neval_fraction = 0.2'
    job = JOB.replace('source = "text.txt"', data).replace("seq_len = 16", "seq_len = 5")
    (folder / "encoder.toml").write_text(job)
    plan = PIPELINE.model_copy(update={"seq_len": 5, "layers_per_stage": (2,), "world_size": 1})
    plan.save(folder / "one.json")
    assert galvatron("train", "encoder.toml", "--plan", "one.json", "--nproc", "1") == 0
    (found,) = [row for row in read_metrics(folder / "runs/encoder/metrics.jsonl") if "eval_loss" in row]
    assert galvatron("convert", "to-hf", "runs/encoder", "exported") == 0
    loss, accuracy = evaluated_by_transformers(folder / "exported", Job.load(folder / "encoder.toml"), folder / "again")
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx(accuracy)
    assert load_config(folder / "exported").id2label == {0: "a", 1: "b"}


T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 260, "d_model": 32, "d_kv": 8,
    "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "pad_token_id": 256, "eos_token_id": 256,
    "decoder_start_token_id": 256,
}  # fmt: skip


def test_completions_are_learnt_by_a_decoder_of_what_its_encoder_reads(
    folder: Path, galvatron: Verb, capfd: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"prompt": "ab" * (1 + n % 7), "completion": "ba" * (1 + n % 3)} for n in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "config.json").write_text(json.dumps(T5))
    data = 'source = "pairs.jsonl"\nrecords = "pairs"\neval_fraction = 0.2'
    (folder / "seq2seq.toml").write_text(JOB.replace('source = "text.txt"', data))
    layers = (LayerStrategy(),) * 4
    PIPELINE.model_copy(update={"layers_per_stage": (4,), "world_size": 1, "layers": layers}).save(folder / "one.json")
    assert galvatron("train", "seq2seq.toml", "--plan", "one.json", "--nproc", "1") == 0, capfd.readouterr().err
    (found,) = [row for row in read_metrics(folder / "runs/seq2seq/metrics.jsonl") if "eval_loss" in row]
    assert galvatron("convert", "to-hf", "runs/seq2seq", "exported") == 0
    loss, _ = evaluated_by_transformers(folder / "exported", Job.load(folder / "seq2seq.toml"), folder / "again")
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-5)
