"""The command line in the process of the tests."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from galvatron.cli import main


@pytest.fixture
def galvatron(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command line in this process; gives its exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["galvatron", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0)

    return run
