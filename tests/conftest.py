"""Fixtures that several test folders share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from galvatron.testing.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """One pool of gloo workers for the whole session."""
    with Pool() as workers:
        yield workers


@pytest.fixture(scope="module", autouse=True)
def no_world_is_left() -> Iterator[None]:
    """A world of one that a test makes in this process would hang ranks that later ones fork from it."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
