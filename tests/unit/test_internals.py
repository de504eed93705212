"""Private names of other packages stand in one folder, which says on which versions they were run."""

from __future__ import annotations

import ast
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

import galvatron
from galvatron import internals
from galvatron.internals import hooks, record_layers_alone
from galvatron.testing.models import tiny_config, tiny_model

SOURCES = Path(galvatron.__file__).parent
PUBLIC = {"os._exit"}  # documented


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _private_names(tree: ast.Module) -> set[str]:
    """Imports of, and attributes with, a private name that this module's classes do not define themselves."""
    own = {
        name
        for node in ast.walk(tree)
        for name in (
            [node.attr]
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls")
            else [node.name]
            if isinstance(node, ast.FunctionDef)
            else [node.target.id]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            else []
        )
    }
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own:
            used.add(ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            used |= {f"{node.module}: {part}" for part in parts if _is_private(part)}
    return used - PUBLIC


@pytest.mark.parametrize("path", sorted(SOURCES.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCES)))
def test_private_names_are_used_in_one_folder_alone(path: Path) -> None:
    if path.parent.name != "internals":
        assert _private_names(ast.parse(path.read_text(encoding="utf-8"))) == set()


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_what_is_installed_lies_between_the_versions_that_were_checked(package: str) -> None:
    assert internals.__doc__ is not None
    row = re.search(rf"^    {package} +(.*)$", internals.__doc__, re.MULTILINE)
    assert row is not None
    minors = [tuple(map(int, text.split(".")[:2])) for text in row[1].split(", ")]
    assert min(minors) <= tuple(map(int, version(package).split(".")[:2])) <= max(minors)


def test_a_storage_is_told_from_others() -> None:
    tensor = torch.zeros(4)
    assert internals.storage_address(tensor) == internals.storage_address(tensor[1:])
    assert internals.storage_address(tensor) != internals.storage_address(torch.zeros(4))


def test_a_buffer_stays_unsaved_when_it_is_replaced() -> None:
    module = nn.Module()
    module.register_buffer("table", torch.zeros(1), persistent=False)
    internals.put_buffer(module, "table", torch.ones(1))
    assert module.get_buffer("table").item() == 1
    assert not module.state_dict()


def test_hooks_and_compilation_are_seen() -> None:
    module = nn.Linear(1, 1)
    assert not list(internals.hooks(module))
    assert not internals.has_tensor_hooks(module.weight)
    assert not internals.is_compiled(module)
    module.register_forward_pre_hook(lambda *_: None)
    module.register_full_backward_hook(lambda *_: None)
    module.weight.register_hook(lambda gradient: gradient)
    module.bias.register_post_accumulate_grad_hook(lambda _: None)
    assert len(list(internals.hooks(module))) == 2
    assert internals.has_tensor_hooks(module.weight)
    assert internals.has_tensor_hooks(module.bias)
    module._compiled_call_impl = module.forward  # as compile() does, which takes long
    assert internals.is_compiled(module)


def test_operations_are_known_by_what_they_do() -> None:
    normal, add = torch.ops.aten.normal_.default, torch.ops.aten.add.Tensor
    assert internals.changes_in_place(normal)
    assert internals.takes_generator(normal)
    assert not internals.changes_in_place(add)
    assert not internals.takes_generator(add)


def test_a_model_records_its_layers_and_nothing_within_them() -> None:
    model = tiny_model(tiny_config("clip")).vision_model
    layers = model.encoder.layers
    record_layers_alone(model, layers)
    inside = [part for layer in layers for child in layer.children() for part in child.modules()]
    size = model.config.image_size
    seen = model(torch.zeros(1, 3, size, size), output_hidden_states=True, output_attentions=False)
    assert len(seen.hidden_states) == len(layers) + 1
    assert [hook for part in inside for hook in hooks(part)] == []
