"""Random mixes of strategies against one process; the seed makes them the same plans every time."""

from __future__ import annotations

import pytest

from galvatron.testing.models import VARIANTS
from galvatron.testing.plans import random_plans
from galvatron.testing.reference import Recipe
from galvatron.testing.sweep import Sweep, variant_spec

SEED = 2026
NAMES = [variant.name for variant in VARIANTS]
SAMPLES = {2: 2, 4: 3, 8: 1}
"""Plans per variant in the default run."""


def _check(sweep: Sweep, variant: str, world_size: int, first: int, last: int) -> None:
    plans = random_plans(variant_spec(variant, world_size), world_size, last, SEED)[first:]
    failures = []
    for index, plan in enumerate(plans, start=first):
        recipe = Recipe(max_grad_norm=0.1) if index % 4 == 3 else Recipe()
        report = sweep.parity(variant, plan, recipe)
        if not report.ok:
            failures.append(f"plan {index}: {report.explain()}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("world_size", SAMPLES)
@pytest.mark.parametrize("variant", NAMES)
def test_a_few_mixed_plans(sweep: Sweep, variant: str, world_size: int) -> None:
    _check(sweep, variant, world_size, 0, SAMPLES[world_size])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world_size", SAMPLES)
@pytest.mark.parametrize("variant", NAMES)
def test_forty_mixed_plans(sweep: Sweep, variant: str, world_size: int) -> None:
    _check(sweep, variant, world_size, SAMPLES[world_size], 40)
