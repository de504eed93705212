"""A job whose texts have one or two images of several sizes (Qwen2-VL), under two plans, and what transformers says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exported import evaluated_by_transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from galvatron.core.job import Job
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import tiny_config
from galvatron.train import read_metrics
from processors import OF_IMAGES

SEQ_LEN, BATCH = 24, 4
WORDS = ("</s>", "?", "<image>", "<start>", "<end>", "red", "blue", "which")
JOB = f"""
[model]
path = "config.json"
[data]
source = "train.jsonl"
validation = "held-out.jsonl"
records = "pairs"
processor = "reads"
tokenizer = "reads"
augment = false
[cluster]
num_processes = 2
device = "cpu"
[train]
global_batch_size = {BATCH}
seq_len = {SEQ_LEN}
num_steps = STEPS
lr = 1e-2
eval_batches = 2
"""


@OF_IMAGES
def test_texts_with_several_images_train_under_two_plans_and_are_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, galvatron: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    """Stages of microbatches, then sharded and cut; the exported directory reads and says the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write()
    alone = LayerStrategy()
    shared, cut = LayerStrategy(dp_shard=2, zero=3), LayerStrategy(tp=2)
    plans = (plan((2, 2), alone, alone, num_microbatches=2), plan((4,), shared, cut))
    for steps, (each, resume) in enumerate(zip(plans, ((), ("--resume", "latest")), strict=True), 2):
        each.save("plan.json")
        Path("job.toml").write_text(JOB.replace("STEPS", str(steps)))
        assert galvatron("train", "job.toml", "--plan", "plan.json", *resume) == 0, capfd.readouterr().err
    assert galvatron("convert", "to-hf", "runs/job", "exported") == 0
    Path("exported.toml").write_text(JOB.replace("STEPS", "3").replace('"reads"', '"exported"'))
    loss, _ = evaluated_by_transformers(tmp_path / "exported", Job.load(Path("exported.toml")), tmp_path / "again")
    rows = [row for row in read_metrics(Path("runs/job/metrics.jsonl")) if "validation_loss" in row]
    assert rows[-1]["validation_loss"] == pytest.approx(loss, rel=1e-5)


def plan(stages: tuple[int, ...], ends: LayerStrategy, inner: LayerStrategy, **more: Any) -> Plan:
    return Plan(
        model="shown", world_size=2, layers_per_stage=stages, embedding=ends, layers=(inner,) * 4, head=ends,
        global_batch_size=BATCH, seq_len=SEQ_LEN, **more,
    )  # fmt: skip


def write() -> None:
    """Texts of both sources, their images, what reads them, and a model's config."""
    sizes = {"red": (4, 4), "blue": (8, 4)}
    for color, size in sizes.items():
        Image.new("RGB", size, color).save(f"{color}.png")
    named = {"image": ["blue.png", "red.png"], "prompt": "<image> which <image>", "completion": " blue red"}
    unnamed = {"image": "red.png", "prompt": "which", "completion": " red"}
    for name, records in (("train", [named, unnamed, named, unnamed]), ("held-out", [unnamed, named, named])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained("reads")
    size = {"shortest_edge": 16, "longest_edge": 64}
    Qwen2VLImageProcessorPil(patch_size=2, merge_size=2, size=size).save_pretrained("reads")
    ids = {f"{name}_token_id": WORDS.index(word) for name, word in (("image", "<image>"), ("vision_start", "<start>"))}
    tiny_config("qwen2_vl", vision_end_token_id=WORDS.index("<end>"), **ids).save_pretrained(".")
