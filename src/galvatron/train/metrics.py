"""What a run measures: one JSON object a step in ``metrics.jsonl``, and TensorBoard if asked.

Knows nothing of models; rank 0 writes.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from galvatron.core.errors import DataError
from galvatron.core.files import write_atomic
from galvatron.core.records import Record, read_text

METRICS_FILE = "metrics.jsonl"
MAX_EXPONENT = 700  # of what a float can hold


class StepMetrics(Record):
    """One step.  ``step`` counts from 1; rates are of the whole world; predictions are None without one.

    ``samples_per_s`` = samples of the batch / ``step_time_s``, ``tokens_per_s`` alike (an image's tokens are patches);
    ``model_flops_per_s`` counts forward + backward without recompute (``ModelSpec.flops_per_token``); ``mfu`` =
    ``model_flops_per_s`` / (world size × measured matrix-multiply rate of a device); ``peak_memory_bytes`` is the
    fullest rank's (see ``PeakMemory``); ``loss_scale`` is fp16's, as the step's gradients were made;
    ``dropped_choices`` counts those beyond their experts' capacity.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    samples_per_s: float
    tokens_per_s: float
    step_time_s: float
    predicted_step_time_s: float | None
    peak_memory_bytes: int
    predicted_peak_memory_bytes: int | None
    mfu: float | None
    model_flops_per_s: float
    loss_scale: float | None = None
    dropped_choices: int | None = None


class Metric(NamedTuple):
    """What an evaluation says beside the loss: ``accuracy`` of classes or pairs (0 to 1), ``perplexity`` of tokens."""

    name: Literal["accuracy", "perplexity"]
    value: float


def perplexity(loss: float) -> Metric:
    """e to the mean loss of tokens."""
    return Metric("perplexity", math.exp(loss) if loss < MAX_EXPONENT else math.inf)


class MetricsLog:
    """Appends rows to ``directory/metrics.jsonl``, each in one write; TensorBoard beside it if asked.

    Rows after ``resumed_step`` (of a run that was cut off after its last save) are dropped first, so that no
    step appears twice.
    """

    def __init__(self, directory: Path, resumed_step: int, *, tensorboard: bool = False) -> None:
        path = directory / METRICS_FILE
        directory.mkdir(parents=True, exist_ok=True)
        rows = [] if not path.exists() else read_metrics(path)
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= resumed_step]
        write_atomic(path, "".join(kept))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._board = _summary_writer(directory / "tensorboard", resumed_step) if tensorboard else None

    def step(self, metrics: StepMetrics) -> None:
        """Append a step's row."""
        self._write(metrics.model_dump())

    def skipped(self, step: int, reason: str) -> None:
        """Append the row of a step that nothing was learnt from: ``step`` and ``skipped``, the reason."""
        self._write({"step": step, "skipped": reason})

    def evaluation(self, step: int, loss: float, name: str = "eval_loss", metric: Metric | None = None) -> None:
        """Append an evaluation's row: ``step``, its loss by ``name`` and the metric (``eval_accuracy``) beside it.

        What is not finite is null: JSON has no NaN.
        """
        row = {name: loss}
        if metric is not None:
            row[f"{name.removesuffix('loss')}{metric.name}"] = metric.value
        self._write({"step": step, **{key: value if math.isfinite(value) else None for key, value in row.items()}})

    def close(self) -> None:
        """Flush and release the files."""
        os.close(self._file)
        if self._board is not None:
            self._board.close()

    def _write(self, row: dict[str, Any]) -> None:
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        while line:  # a disk that is nearly full takes a part
            line = line[os.write(self._file, line) :]
        if self._board is not None:
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    self._board.add_scalar(key, value, row["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that a kill cut short is left out.  Raises DataError."""
    rows = []
    lines = read_text(path, DataError).split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(dict(json.loads(line)))
        except ValueError:
            raise DataError(f"{path}:{number} is not a JSON object; remove that line") from None
    return rows


def _summary_writer(directory: Path, resumed_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=resumed_step + 1)
