"""The versions that ``make test-lowest`` installs are the lowest that pyproject.toml admits."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_lower_bound_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests/lowest.txt").read_text(), re.MULTILINE))
    needed = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    tools = [line for line in project["optional-dependencies"]["dev"] if line.startswith(("pytest", "hypothesis"))]
    for requirement in [*needed, *tools]:
        name, bound = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()  # type: ignore[union-attr]
        assert (pins[name] + ".0").startswith(bound), requirement
