from __future__ import annotations

import pytest

from galvatron.testing.pool import Pool
from galvatron.testing.reference import Recipe
from galvatron.testing.sweep import Sweep


@pytest.fixture(scope="session")
def sweep(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """References trained in this session are shared by all its parity checks.

    Two steps: the second one's update is of moments that the first left.
    """
    return Sweep(pool, tmp_path_factory.mktemp("references"), Recipe(num_steps=2))
