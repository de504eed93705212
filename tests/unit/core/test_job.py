"""Settings of a job: each is checked where it enters, from a file and from Python, and named as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from galvatron.core.errors import ConfigError
from galvatron.core.job import Job, TrainSection

JOB = """
[model]
path = "config.json"
[data]
source = "python-docs"
[train]
global_batch_size = 4
seq_len = 8
"""


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
@pytest.mark.parametrize("name", ["lr", "min_lr", "eps", "weight_decay", "max_grad_norm"])
def test_numbers_must_be_finite(tmp_path: Path, name: str, value: str) -> None:
    (tmp_path / "job.toml").write_text(f"{JOB}num_steps = 6\n{name} = {value}\n")
    with pytest.raises(ConfigError, match=rf"train\.{name}: must be .* \(got {value}\)"):
        Job.load(tmp_path / "job.toml")
    with pytest.raises(ValidationError, match=name):
        TrainSection(global_batch_size=4, seq_len=8, num_steps=6, **{name: float(value)})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("warmup_steps = 7", "warmup_steps=7 must not exceed num_steps=6"),
        ("lr = 0.05\nmin_lr = 1.0", r"min_lr=1\.0 must not exceed lr=0\.05"),
        ('lr = 0.05\nmin_lr = 0.01\nlr_schedule = "constant"', "no meaning for a constant schedule"),
        ('lr_schedule = "wsd"', "wsd schedule needs decay_steps from 1 to"),
        ('lr_schedule = "wsd"\ndecay_steps = 5\nwarmup_steps = 2', "= 4, got 5"),
        ("decay_steps = 2", "belongs to the wsd schedule"),
        ("betas = [0.9, 1.0]", r"train\.betas\.1: must be less than 1 \(got 1\.0\)"),
        ("betas = [-0.1, 0.9]", r"train\.betas\.0: must be at least 0 \(got -0\.1\)"),
        ("betas = [nan, 0.9]", r"train\.betas\.0: must be a finite number \(got nan\)"),
        ("eps = 0.0", r"train\.eps: must be greater than 0"),
        ("weight_decay = -0.1", r"train\.weight_decay: must be at least 0"),
        ("seed = -1", r"train\.seed: must be at least 0 \(got -1\)"),
        (f"seed = {2**64}", rf"train\.seed: must be less than {2**64}"),
        ("fp8 = true", "fp8 products go with precision=bf16 for all else, got fp32; set it to bf16"),
        (
            'precision = "fp16"\ngrad_reduce_dtype = "fp16"',
            r"train\.grad_reduce_dtype: must be 'fp32' or 'bf16'",
        ),
        ("label_smoothing = 1.0", r"train\.label_smoothing: must be less than 1"),
        ("z_loss = -1e-4", r"train\.z_loss: must be at least 0"),
        ("max_skipped_steps = -1", r"train\.max_skipped_steps"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "job.toml").write_text(f"{JOB}num_steps = 6\n{line}\n")
    with pytest.raises(ConfigError, match=words) as caught:
        Job.load(tmp_path / "job.toml")
    assert "\n" not in str(caught.value)


def test_the_largest_seed_is_one_that_generators_take() -> None:
    torch = pytest.importorskip("torch")
    section = TrainSection(global_batch_size=4, seq_len=8, num_steps=6, seed=2**64 - 1)
    torch.Generator().manual_seed(section.seed)
