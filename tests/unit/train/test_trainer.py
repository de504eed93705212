from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from train_fakes import FakeModel, global_values, plan_for, section

from galvatron.core.errors import CheckpointError, ConfigError, DataError, GalvatronError, PlanError
from galvatron.core.job import TrainSection
from galvatron.train import (
    Dataset,
    Reporter,
    StepMetrics,
    TrainResult,
    build_optimizer,
    load_checkpoint,
    lr_at,
    read_metrics,
    read_state,
    train,
)
from galvatron.train.metrics import Metric, MetricsLog
from galvatron.train.optimizer import set_lr, update
from galvatron.train.rows import StreamRows

TOKENS = np.random.RandomState(0).randint(0, 40, size=2100)


def run(model: FakeModel, run_dir: Path, settings: TrainSection, **options: object) -> TrainResult:
    fingerprint = str(options.pop("fingerprint", "abc"))
    dataset = Dataset(
        StreamRows(TOKENS, settings.seq_len), global_batch_size=settings.global_batch_size, seed=settings.seed,
        eval_fraction=0.05, fingerprint=fingerprint, vocab_size=40, validation=options.pop("validation", None),
    )  # fmt: skip
    return train(model, settings, dataset, plan=plan_for(settings), run_dir=run_dir, **options)


class Recorder(Reporter):
    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def started(self, first_step: int, num_steps: int) -> None:
        self.events.append(("started", first_step))

    def stepped(self, metrics: StepMetrics) -> None:
        self.events.append(("stepped", metrics.step))

    def skipped(self, step: int, reason: str) -> None:
        self.events.append(("skipped", step))

    def evaluated(self, step: int, loss: float, name: str, metric: Metric) -> None:
        self.events.append(("evaluated" if name == "eval_loss" else name, step))

    def saved(self, step: int, path: Path) -> None:
        assert (path / "metadata.json").exists()
        self.events.append(("saved", step))


class StopsAt(Reporter):
    """Sends this process ``number`` after ``step``."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def stepped(self, metrics: StepMetrics) -> None:
        if metrics.step == self.step:
            os.kill(os.getpid(), self.number)


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row]


def test_loss_falls_and_everything_is_reported_in_order(tmp_path: Path) -> None:
    recorder = Recorder()
    settings = section(num_steps=5, eval_every=2, save_every=3)
    result = run(FakeModel.make(), tmp_path, settings, reporter=recorder, device_flops_per_s=1e12)
    assert recorder.events == [
        ("started", 1), ("stepped", 1), ("stepped", 2), ("evaluated", 2), ("stepped", 3), ("saved", 3),
        ("stepped", 4), ("evaluated", 4), ("stepped", 5), ("evaluated", 5), ("saved", 5),
    ]  # fmt: skip
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["tokens_per_s"] == pytest.approx(8 * rows[0]["samples_per_s"])
    assert rows[0]["tokens_per_s"] == pytest.approx(32 / rows[0]["step_time_s"])
    assert rows[0]["mfu"] == pytest.approx(rows[0]["model_flops_per_s"] / 1e12)
    assert result.steps == 5
    assert result.final_loss == rows[-1]["loss"]
    assert result.eval_loss is not None
    assert result.stopped_by is None


def test_evaluation_is_the_mean_over_counted_tokens(tmp_path: Path) -> None:
    model = FakeModel.make()
    result = run(model, tmp_path, section(num_steps=1, eval_batches=99))
    dataset = Dataset(StreamRows(TOKENS, 8), global_batch_size=1, eval_fraction=0.05)
    single = [float(model.evaluate(**dataset.eval_batch(i))) for i in range(dataset.num_eval_batches)]
    assert len(single) % 4 != 0  # so that the last batch of four was padded
    assert result.eval_loss == pytest.approx(sum(single) / len(single), rel=1e-6)


def test_a_validation_source_has_lines_of_its_own(tmp_path: Path) -> None:
    model, recorder = FakeModel.make(), Recorder()
    other = Dataset(StreamRows(TOKENS[:130], 8), global_batch_size=4, eval_fraction=1.0)
    settings = section(num_steps=3, eval_every=2, eval_batches=99)
    result = run(model, tmp_path, settings, validation=other, reporter=recorder)
    single = Dataset(StreamRows(TOKENS[:130], 8), global_batch_size=1, eval_fraction=1.0)
    each = [float(model.evaluate(**single.eval_batch(i))) for i in range(single.num_eval_batches)]
    assert len(each) == 16
    assert result.validation_loss == pytest.approx(sum(each) / 16, rel=1e-6)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "validation_loss" in row]
    assert [row["step"] for row in rows] == [2, 3]
    assert rows[-1]["validation_loss"] == result.validation_loss != result.eval_loss
    assert ("validation_loss", 2) in recorder.events


@pytest.mark.parametrize("swapped", [False, True])
def test_resume_continues_as_if_never_stopped(tmp_path: Path, swapped: bool) -> None:
    settings = section(num_steps=9, warmup_steps=2, save_every=2)
    straight = FakeModel.make()
    run(straight, tmp_path / "straight", settings)
    run(FakeModel.make(), tmp_path / "cut", settings, stop_after=4)
    resumed = FakeModel.make(swapped=swapped, seed=9)
    run(resumed, tmp_path / "cut", settings, resume="latest")
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    for ours, theirs in zip(resumed.local_parameters, straight.local_parameters, strict=True):
        assert torch.equal(global_values(ours), global_values(theirs))


def test_a_run_may_resume_from_another_run_directory(tmp_path: Path) -> None:
    settings = section(num_steps=6)
    run(FakeModel.make(), tmp_path / "first", settings, stop_after=4)
    run(FakeModel.make(), tmp_path / "second", settings, resume=tmp_path / "first")
    assert len(losses(tmp_path / "second")) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_after_the_step_with_a_save(tmp_path: Path, number: int) -> None:
    before = signal.signal(number, signal.default_int_handler)  # who runs the tests (nohup) may ignore it
    try:
        result = run(FakeModel.make(), tmp_path, section(num_steps=9), reporter=StopsAt(3, number))
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert (result.steps, result.stopped_by, result.checkpoint.name) == (4, number, "step-000004")
    run(FakeModel.make(), tmp_path, section(num_steps=9), resume="latest")
    assert len(losses(tmp_path)) == 9


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        result = run(FakeModel.make(), tmp_path, section(num_steps=5), reporter=StopsAt(3, signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.steps, result.stopped_by) == (5, None)


def test_a_run_killed_before_its_first_save_begins_again(tmp_path: Path) -> None:
    killed = MetricsLog(tmp_path, 0)
    killed.evaluation(1, 2.5)
    killed.close()
    (tmp_path / "checkpoints" / ".step-000002.tmp").mkdir(parents=True)
    run(FakeModel.make(), tmp_path, section(num_steps=3))
    assert len(losses(tmp_path)) == 3


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights(tmp_path: Path) -> None:
    model = FakeModel.make()
    original = model.train_step
    calls: list[torch.Tensor] = []

    def poisoned(input_ids: torch.Tensor, labels: torch.Tensor, **terms: float) -> torch.Tensor:
        calls.append(original(input_ids, labels))
        return torch.tensor(math.nan) if len(calls) == 3 else calls[-1]

    model.train_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(GalvatronError, match="the loss is nan at step 3, training cannot go on"):
        run(model, tmp_path, section(save_every=2))
    assert len(losses(tmp_path)) == 2
    twin = FakeModel.make(seed=5)
    run(twin, tmp_path, section(), resume="latest")


def test_terms_of_the_loss_reach_every_step(tmp_path: Path) -> None:
    model, seen = FakeModel.make(), []
    original = model.train_step

    def train_step(input_ids: torch.Tensor, labels: torch.Tensor, **terms: float) -> torch.Tensor:
        seen.append(terms)
        return original(input_ids, labels)

    model.train_step = train_step  # type: ignore[method-assign]
    run(model, tmp_path, section(num_steps=2, label_smoothing=0.1, z_loss=1e-4))
    assert seen == [{"label_smoothing": 0.1, "z_loss": 1e-4}] * 2


def poisoned(model: FakeModel, batches: set[int], *, in_gradient: bool = False) -> FakeModel:
    """``model`` whose loss is NaN, or whose gradients are infinite, at the ``batches`` counted from 1."""
    original = model.train_step
    calls: list[torch.Tensor] = []

    def train_step(input_ids: torch.Tensor, labels: torch.Tensor, **terms: float) -> torch.Tensor:
        calls.append(original(input_ids, labels))
        if len(calls) in batches:
            for part in model.local_parameters:
                part.tensor.grad = torch.full_like(part.tensor, math.inf)
            return calls[-1] if in_gradient else torch.tensor(math.nan)
        return calls[-1]

    model.train_step = train_step  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("in_gradient", [False, True])
@pytest.mark.parametrize("stop_after", [None, 3, 4])
def test_skipped_steps_teach_nothing_and_shift_nothing(
    tmp_path: Path, stop_after: int | None, in_gradient: bool
) -> None:
    settings = section(num_steps=7, max_skipped_steps=2)
    model = poisoned(FakeModel.make(), {3, 4}, in_gradient=in_gradient)
    if stop_after is not None:
        run(model, tmp_path, settings, stop_after=stop_after)
        state = read_state(tmp_path / "checkpoints" / f"step-{stop_after:06d}")
        assert (state.skipped_steps, state.skipped_in_a_row) == (stop_after - 2, stop_after - 2)
        model = poisoned(FakeModel.make(seed=9), {4 - stop_after}, in_gradient=in_gradient)
    run(model, tmp_path, settings, **({"resume": "latest"} if stop_after else {}))

    twin = FakeModel.make()
    optimizer = build_optimizer(twin.local_parameters, settings)
    dataset = Dataset(StreamRows(TOKENS, 8), global_batch_size=4, seed=3, eval_fraction=0.05)
    expected = []
    for step in (0, 1, 4, 5, 6):
        set_lr(optimizer, lr_at(step, settings))
        loss = twin.train_step(**dataset.batch(step))
        expected.append(float(loss))
        update(optimizer, loss, twin.grad_norm(), settings.max_grad_norm)
    assert losses(tmp_path) == expected
    for ours, theirs in zip(model.local_parameters, twin.local_parameters, strict=True):
        assert torch.equal(ours.tensor, theirs.tensor)
    last = FakeModel.make()
    loaded = build_optimizer(last.local_parameters, settings)
    state = load_checkpoint(tmp_path / "checkpoints" / "step-000007", last, loaded)
    assert (state.step, state.skipped_steps, state.skipped_in_a_row) == (7, 2, 0)
    assert float(loaded.state[last.bias.tensor]["step"]) == 5
    defect = "the gradient norm is inf" if in_gradient else "the loss is nan"
    skipped = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "skipped" in row]
    assert skipped == [{"step": step, "skipped": defect} for step in (3, 4)]


@pytest.mark.parametrize("stop_after", [None, 3, 4])
def test_more_skipped_steps_in_a_row_than_allowed_end_the_run(tmp_path: Path, stop_after: int | None) -> None:
    settings = section(num_steps=9, max_skipped_steps=2)
    model = poisoned(FakeModel.make(), {3, 4, 5})
    options: dict[str, str] = {}
    if stop_after is not None:
        run(model, tmp_path, settings, stop_after=stop_after)
        model = poisoned(FakeModel.make(), set(range(1, 6 - stop_after)))
        options = {"resume": "latest"}
    recorder = Recorder()
    with pytest.raises(GalvatronError, match=r"the loss is nan at step 5 after 2 skipped in a row, .* above 2"):
        run(model, tmp_path, settings, reporter=recorder, **options)
    said = [event for event in recorder.events if event[0] == "skipped"]
    assert said == [("skipped", step) for step in range((stop_after or 2) + 1, 5)]


def test_finite_steps_between_begin_the_count_anew(tmp_path: Path) -> None:
    result = run(poisoned(FakeModel.make(), {1, 3, 5}), tmp_path, section(num_steps=5, max_skipped_steps=1))
    assert result.steps == 5
    assert result.final_loss == losses(tmp_path)[-1]


def test_an_evaluation_that_is_not_finite_is_null_in_the_metrics(tmp_path: Path) -> None:
    model = FakeModel.make()
    model.evaluate = lambda input_ids, labels: math.nan  # type: ignore[method-assign]
    result = run(model, tmp_path, section(num_steps=1))
    assert math.isnan(result.eval_loss or 0)
    assert (
        (tmp_path / "metrics.jsonl").read_text().endswith('{"step": 1, "eval_loss": null, "eval_perplexity": null}\n')
    )


def test_a_used_run_directory_is_not_overwritten(tmp_path: Path) -> None:
    run(FakeModel.make(), tmp_path, section())
    with pytest.raises(ConfigError, match="already holds a run; resume it"):
        run(FakeModel.make(), tmp_path, section())
    assert len(losses(tmp_path)) == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 4}, "trained with seed=3 but the job has seed=4"),
        ({"global_batch_size": 8}, "global_batch_size=4 but the job has global_batch_size=8"),
        ({"seq_len": 16}, "seq_len=8 but the job has seq_len=16"),
    ],
)
def test_resume_refuses_another_sample_order(tmp_path: Path, changes: dict[str, int], words: str) -> None:
    run(FakeModel.make(), tmp_path, section(), stop_after=2)
    with pytest.raises(CheckpointError, match=words):
        run(FakeModel.make(), tmp_path, section(**changes), resume="latest")
    assert len(losses(tmp_path)) == 2


def test_resume_refuses_other_data_and_a_finished_run(tmp_path: Path) -> None:
    run(FakeModel.make(), tmp_path, section())
    with pytest.raises(CheckpointError, match="was trained on other tokens"):
        run(FakeModel.make(), tmp_path, section(), resume="latest", fingerprint="other")
    with pytest.raises(ConfigError, match="has done 6 of 6 steps already; raise num_steps"):
        run(FakeModel.make(), tmp_path, section(), resume="latest")


def test_plan_vocabulary_and_settings_must_agree(tmp_path: Path) -> None:
    dataset = Dataset(StreamRows(TOKENS, 8), global_batch_size=4, seed=3, vocab_size=40)
    with pytest.raises(PlanError, match="the plan has seq_len=16 but the job has seq_len=8"):
        train(FakeModel.make(), section(), dataset, plan=plan_for(section(seq_len=16)), run_dir=tmp_path)
    big = Dataset(StreamRows(TOKENS, 8), global_batch_size=4, vocab_size=999)
    with pytest.raises(DataError, match="token ids up to 998 but the model's vocab_size is 257"):
        train(FakeModel.make(), section(), big, plan=plan_for(section()), run_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
