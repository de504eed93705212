from __future__ import annotations

import json
from pathlib import Path

import pytest

from galvatron.core.errors import DataError
from galvatron.train.metrics import METRICS_FILE, MetricsLog, StepMetrics, read_metrics


def row(step: int) -> StepMetrics:
    return StepMetrics(
        step=step, loss=2.5, grad_norm=1.0, lr=1e-3, samples_per_s=1.0, tokens_per_s=10.0, step_time_s=0.1,
        predicted_step_time_s=None, peak_memory_bytes=5, predicted_peak_memory_bytes=7, mfu=None, model_flops_per_s=1.0,
    )  # fmt: skip


def test_rows_after_the_resumed_step_and_a_cut_last_line_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.step(row(step))
    log.evaluation(2, 2.25)
    log.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "lo')
    log = MetricsLog(tmp_path, 2)
    log.step(row(3))
    log.close()
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert [(r["step"], "loss" in r) for r in rows] == [(1, True), (2, True), (2, False), (3, True)]
    assert rows[0] == json.loads(row(1).model_dump_json())


def test_a_line_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not a JSON object"):
        read_metrics(tmp_path / METRICS_FILE)


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.step(row(1))
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("loss")[0].value == 2.5
    assert "mfu" not in events.Tags()["scalars"]
