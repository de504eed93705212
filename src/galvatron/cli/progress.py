"""Training as people watch it: a line now and then, a live line in a terminal, and a summary at the end.

Takes the metrics of steps; gives text.  Knows nothing of how a step runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from galvatron.core.units import format_bytes, format_rate, format_seconds
from galvatron.train.interface import Reporter

from .console import console, say

if TYPE_CHECKING:
    from galvatron.train.metrics import Metric, StepMetrics

LINES = 12  # of steps, over a whole run
ROWS = (
    "steps",
    "loss",
    "samples/s",
    "tokens/s",
    "step time, predicted",
    "step time, measured",
    "    error of the prediction",
    "peak memory, predicted",
    "peak memory, measured",
    "    error of the prediction",
)
WARMUP_STEPS = 3  # left out of the summary: first steps allocate and connect


class ConsoleReporter(Reporter):
    """Prints on rank 0 and keeps the steps' metrics for the summary; a terminal that hung up ends no run.

    ``on_start`` is called when nothing is left to refuse and the first step is about to run.
    """

    def __init__(self, on_start: Callable[[], None] = lambda: None) -> None:
        self.steps: list[StepMetrics] = []
        self._on_start = on_start
        self._every = 1
        self._status = console().status("starting", spinner="line")

    def started(self, first_step: int, num_steps: int) -> None:
        """Choose how often to print a line."""
        self._on_start()
        self._every = max(1, round((num_steps - first_step + 1) / LINES))
        with suppress(OSError):
            self._status.start()

    def noted(self, text: str) -> None:
        """Print the sentence."""
        _line(text)

    def stepped(self, metrics: StepMetrics) -> None:
        """Print the step, or show it until the next one."""
        self.steps.append(metrics)
        text = describe_step(metrics)
        with suppress(OSError):
            self._status.update(text)
        if len(self.steps) == 1 or metrics.step % self._every == 0:
            _line(text)

    def skipped(self, step: int, reason: str) -> None:
        """Print why."""
        say(f"step {step:>5}  skipped: {reason}")

    def evaluated(self, step: int, loss: float, name: str, metric: Metric) -> None:
        """Print the loss, and what it means."""
        words = {"eval_loss": "evaluation loss", "validation_loss": "validation loss"}
        value = f"{metric.value:.1%}" if metric.name == "accuracy" else f"{metric.value:,.2f}"
        _line(f"step {step:>5}  {words[name]} {loss:.3f}, {metric.name} {value}")

    def saved(self, step: int, path: Path) -> None:
        """Print where the checkpoint is."""
        _line(f"step {step:>5}  saved {path}")

    def close(self) -> None:
        """End the live line."""
        with suppress(OSError):
            self._status.stop()


def _line(text: str) -> None:
    with suppress(OSError):
        say(text)


def describe_step(metrics: StepMetrics) -> str:
    """One line: loss, speed, and the step time beside its prediction."""
    predicted = metrics.predicted_step_time_s
    promise = f" (predicted {format_seconds(predicted)})" if predicted is not None else ""
    dropped = f"  {metrics.dropped_choices:,} choices dropped" if metrics.dropped_choices else ""
    return (
        f"step {metrics.step:>5}  loss {metrics.loss:.3f}  {format_rate(metrics.samples_per_s)} samples/s, "
        f"{format_rate(metrics.tokens_per_s)} tokens/s  {format_seconds(metrics.step_time_s)} a step{promise}{dropped}"
    )


def summary(legs: Iterable[tuple[str, list[StepMetrics]]]) -> Table:
    """Predicted beside measured, a column a leg: median step time and peak memory with the prediction's error."""
    table = Table(title="Predicted and measured", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("")
    columns = [(name, _cells(steps)) for name, steps in legs if steps]
    for name, _ in columns:
        table.add_column(name, justify="right")
    for row in zip(ROWS, *(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table


def _cells(steps: list[StepMetrics]) -> list[str]:
    settled = steps[WARMUP_STEPS:] or steps
    time_s = statistics.median(step.step_time_s for step in settled)
    memory = max(step.peak_memory_bytes for step in steps)
    last = steps[-1]
    return [
        f"{steps[0].step} to {last.step}",
        f"{steps[0].loss:.3f} to {last.loss:.3f}",
        format_rate(statistics.median(step.samples_per_s for step in settled)),
        format_rate(statistics.median(step.tokens_per_s for step in settled)),
        _or_dash(last.predicted_step_time_s, format_seconds),
        format_seconds(time_s),
        _error(last.predicted_step_time_s, time_s),
        _or_dash(last.predicted_peak_memory_bytes, format_bytes),
        format_bytes(memory),
        _error(last.predicted_peak_memory_bytes, memory),
    ]


def _or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return "-" if value is None else text(value)


def _error(predicted: float | None, measured: float) -> str:
    """The prediction's error: +10% promised a tenth too much."""
    return "-" if not predicted or not measured else f"{100 * (predicted / measured - 1):+.0f}%"
