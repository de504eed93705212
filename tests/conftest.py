"""Fixtures that several test folders share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import pytest

from galvatron.testing.pool import Pool

os.environ.pop("COLUMNS", None)  # of whoever runs the tests (pytest-xdist sets 80): lines would be wrapped there


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


@pytest.fixture
def galvatron(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command line in this process; gives its exit code."""
    from galvatron.cli import main

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["galvatron", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)

    return run
