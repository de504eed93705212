"""The certificate can fail: each fault planted in a reference, a plan or a model is found and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from galvatron.core.errors import PlanError
from galvatron.core.model import Precision
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing import ParityReport, Pool, Recipe, parity
from galvatron.testing.compare import Deviation
from galvatron.testing.models import tiny_config, tiny_model
from galvatron.testing.parity import DRAWS, decided, parity_with
from galvatron.testing.reference import Reference, Tensors, train_reference

ONE = LayerStrategy(tp=2)
PLAN = Plan(
    model="llama",
    world_size=2,
    layers_per_stage=(2,),
    num_microbatches=2,
    global_batch_size=4,
    seq_len=8,
    embedding=ONE,
    layers=(ONE, LayerStrategy(dp_shard=2, zero=3)),
    head=ONE,
)
Drawn = Callable[[int, bool], Path]
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def reference() -> Reference:
    return train_reference(tiny_model("llama", num_hidden_layers=2), 4, 8, Recipe(num_steps=2))


@pytest.fixture
def drawn(tmp_path: Path) -> Drawn:
    """The references of draws, in float32 and in float64."""

    def path(draw: int, exact: bool) -> Path:
        found = tmp_path / f"{draw}-{exact}.pt"
        if not found.exists():
            model = tiny_model("llama", num_hidden_layers=2)
            train_reference(model, 4, 8, Recipe(num_steps=1, seed=draw), exact=exact).save(found)
        return found

    return path


def _verdict(reference: Reference, pool: Pool, folder: Path) -> ParityReport:
    reference.save(folder / "reference.pt")
    return parity_with(folder / "reference.pt", PLAN, pool)


def _nudged(tensors: Tensors) -> Tensors:
    """The tensors with one element of one of them off by a ten-thousandth of the largest."""
    nudged = tensors[NAME].clone()
    nudged[-1, -1] += 1e-4 * nudged.abs().max()
    return {**tensors, NAME: nudged}


def test_an_untouched_reference_is_met(reference: Reference, pool: Pool, tmp_path: Path) -> None:
    report = _verdict(reference, pool, tmp_path)
    assert report.ok, report.explain()
    assert report.explain().startswith("parity holds: loss")
    assert max(report.worst.values()) > 0


def test_a_reference_in_float64_is_met(pool: Pool, tmp_path: Path) -> None:
    exact = train_reference(tiny_model("llama", num_hidden_layers=2), 4, 8, Recipe(num_steps=2), exact=True)
    assert exact.steps[1].gradients[NAME].dtype == torch.float64
    report = _verdict(exact, pool, tmp_path)
    assert report.ok, report.explain()


@pytest.mark.parametrize(
    ("error", "against_float64", "precision", "ok"),
    [
        (2e-5, 8e-6, "fp32", True),
        (2e-5, 2e-5, "fp32", False),
        (2e-4, 8e-6, "fp32", False),  # no rounding
        (0.25, 8e-6, "bf16", False),
    ],
)
def test_float64_decides_where_float32_fails_narrowly(
    drawn: Drawn, error: float, against_float64: float, precision: Precision, ok: bool
) -> None:
    def held(path: Path) -> ParityReport:
        return _report(against_float64 if path == drawn(0, True) else error, precision)

    report = decided(drawn, held, precision)
    assert (report.ok, report.exact, report.undecided) == (ok, ok, ())
    assert report.worst["gradient"] == (against_float64 if ok else error)


@pytest.mark.parametrize(("wrong_draws", "ok"), [((0,), True), ((0, 1), False), ((0, 1, 2), False)])
def test_a_draw_on_which_one_process_is_not_sure_decides_nothing(
    drawn: Drawn, wrong_draws: tuple[int, ...], ok: bool
) -> None:
    """Only draw 0's reference is off its float64."""
    (step,) = Reference.load(drawn(0, False)).steps
    _change(drawn(0, False), steps=(dataclasses.replace(step, gradients=_nudged(step.gradients)),))

    def held(path: Path) -> ParityReport:
        return _report(0.05 if path in {drawn(draw, False) for draw in wrong_draws} else 1e-6)

    report = decided(drawn, held, "fp32")
    assert report.ok == ok
    assert [(own.kind, own.name, own.step) for own in report.undecided] == [("gradient", NAME, 0)]
    assert f"one process itself is off float64: gradient of {NAME} in step 0" in report.explain()


def test_a_plan_that_no_draw_decides_fails(drawn: Drawn) -> None:
    for draw in range(DRAWS):
        _change(drawn(draw, False), final_loss=0.0)
    report = decided(drawn, lambda path: _report(0.05), "fp32")
    assert not report.ok
    assert len(report.undecided) == DRAWS - 1


def _change(path: Path, **changes: Any) -> None:
    reference = Reference.load(path)
    path.unlink()  # its tensors stay mapped
    dataclasses.replace(reference, **changes).save(path)


def _report(error: float, precision: Precision = "fp32") -> ParityReport:
    deviation = Deviation(kind="gradient", name=NAME, step=0, rank=0, precision=precision, error=error)
    return ParityReport(plan=PLAN, deviations=(deviation,))


@pytest.mark.parametrize("kind", ["parameter", "exp_avg", "exp_avg_sq"])
def test_one_wrong_element_of_the_end_state_is_found(
    reference: Reference, pool: Pool, tmp_path: Path, kind: str
) -> None:
    field = "parameters" if kind == "parameter" else kind
    wrong = dataclasses.replace(reference, **{field: _nudged(getattr(reference, field))})
    report = _verdict(wrong, pool, tmp_path)
    # the last element of a row-sharded weight is rank 1's
    assert [(d.kind, d.name, d.rank) for d in report.deviations if not d.ok] == [(kind, NAME, 1)]
    assert f"{kind} of {NAME} at the end on rank 1" in report.explain()


def test_one_wrong_gradient_element_is_found(reference: Reference, pool: Pool, tmp_path: Path) -> None:
    first, second = reference.steps
    wrong = dataclasses.replace(second, gradients=_nudged(second.gradients))
    report = _verdict(dataclasses.replace(reference, steps=(first, wrong)), pool, tmp_path)
    assert [(d.kind, d.name, d.step) for d in report.deviations if not d.ok] == [("gradient", NAME, 1)]


def test_another_recipe_is_found(reference: Reference, pool: Pool, tmp_path: Path) -> None:
    wrong = dataclasses.replace(reference, recipe=dataclasses.replace(reference.recipe, weight_decay=0.0))
    assert {d.kind for d in _verdict(wrong, pool, tmp_path).deviations if not d.ok} >= {"parameter"}


def test_numbers_that_are_none_are_found(reference: Reference, pool: Pool, tmp_path: Path) -> None:
    first, second = reference.steps
    gradients = {**first.gradients, NAME: torch.full_like(first.gradients[NAME], torch.nan)}
    wrong = dataclasses.replace(first, loss=float("nan"), gradients=gradients)
    report = _verdict(dataclasses.replace(reference, steps=(wrong, second)), pool, tmp_path)
    assert report.worst["loss"] == report.worst["gradient"] == float("inf")


def test_the_public_call_takes_a_config(pool: Pool) -> None:
    config = tiny_config("llama", num_hidden_layers=2)
    report = parity(config, PLAN, recipe=Recipe(num_steps=1), pool=pool)
    assert report.ok, report.explain()


def test_other_sums_are_refused() -> None:
    with pytest.raises(PlanError, match="grad_reduce_dtype=bf16"):
        parity(tiny_config("llama"), PLAN.model_copy(update={"grad_reduce_dtype": "bf16"}))
