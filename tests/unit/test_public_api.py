"""The package's public names load lazily, and the deciding half loads without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import galvatron


@pytest.mark.parametrize("name", galvatron.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(galvatron, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = galvatron.nonsense


@pytest.mark.parametrize("package", ["search", "parallelize"])
def test_packages_can_be_called_after_any_import(package: str) -> None:
    code = f"import galvatron.{package} as p, galvatron; assert callable(p) and galvatron.{package} is p"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["galvatron", "galvatron.search", "galvatron.report", "galvatron.cli"])
def test_deciding_imports_no_torch(module: str) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'datasets', 'safetensors']))\n"
        f"import {module}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
