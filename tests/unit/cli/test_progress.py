"""What people read of a run's metrics."""

from __future__ import annotations

import pytest
from rich.console import Console

from galvatron.cli.progress import describe_step, summary
from galvatron.train import StepMetrics


def metrics(step: int, step_time_s: float = 0.2, predicted: float | None = 0.25) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=5.0 - step / 10,
        grad_norm=1.0,
        lr=1e-3,
        samples_per_s=7.8125,
        tokens_per_s=1000.0,
        step_time_s=step_time_s,
        predicted_step_time_s=predicted,
        peak_memory_bytes=2 * 2**20,
        predicted_peak_memory_bytes=None if predicted is None else 2**20,
        mfu=None,
        model_flops_per_s=1.0,
    )


@pytest.mark.parametrize(
    ("predicted", "text"),
    [
        (0.25, "step     7  loss 4.300  7.81 samples/s, 1,000 tokens/s  200 ms a step (predicted 250 ms)"),
        (None, "step     7  loss 4.300  7.81 samples/s, 1,000 tokens/s  200 ms a step"),
    ],
)
def test_a_step_is_one_line(predicted: float | None, text: str) -> None:
    assert describe_step(metrics(7, predicted=predicted)) == text


def test_a_step_says_what_its_experts_dropped_if_they_did() -> None:
    none, some = (metrics(7).model_copy(update={"dropped_choices": dropped}) for dropped in (0, 1234))
    assert describe_step(none) == describe_step(metrics(7))
    assert describe_step(some) == describe_step(none) + "  1,234 choices dropped"


def test_the_summary_leaves_first_steps_out_and_gives_the_error_of_the_prediction() -> None:
    slow_start = [metrics(step, step_time_s=9.0 if step <= 3 else 0.2) for step in range(1, 8)]
    rows = _rows([("the plan", slow_start), ("another", [metrics(8, predicted=None)]), ("not run", [])])
    assert rows["steps"] == ["1 to 7", "8 to 8"]
    assert rows["step time, measured"] == ["200 ms", "200 ms"]
    assert rows["step time, predicted"] == ["250 ms", "-"]
    assert rows["peak memory, predicted"] == ["1.0 MiB", "-"]
    assert rows["error of the prediction"] == ["-50%", "-"], "the last such row is memory's"


def _rows(legs: list[tuple[str, list[StepMetrics]]]) -> dict[str, list[str]]:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(summary(legs))
    cells = ([cell.strip() for cell in line.split("  ") if cell.strip()] for line in capture.get().splitlines())
    return {row[0]: row[1:] for row in cells if row}
