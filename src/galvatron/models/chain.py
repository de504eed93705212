"""The chain of layers of a model: where each is, and the stack that it belongs to."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from galvatron.core.family import Experts, Family, Region, Stack

SCORE_BIAS = "position_bias"
"""The argument by which layers are given a bias of attention scores that another has made."""


@dataclass(frozen=True)
class Link:
    """A layer of the chain: its path in the model, its stack, and whether it begins or ends with whole sequences.

    ``is_idle``: nothing takes what it comes to; whole sequences pass it.
    """

    path: str
    stack: Stack
    is_first: bool
    is_last: bool
    is_idle: bool = False


def chain_of(model: PreTrainedModel, family: Family) -> tuple[Link, ...]:
    """Every layer, in the order of the forward pass."""
    links: list[Link] = []
    for stack in family.stacks:
        layers = model.get_submodule(stack.path)
        assert isinstance(layers, nn.ModuleList)
        taken_at = getattr(model.config, stack.taken_at or "", None)
        last, meets = len(layers) - 1 - stack.idle_layers(taken_at, len(layers)), stack.recorded
        links += [
            Link(f"{stack.path}.{i}", stack, meets or i == 0 or i > last, meets or i >= last, is_idle=i > last)
            for i in range(len(layers))
        ]
    return tuple(links)


def regions_in(layer: nn.Module, stack: Stack) -> tuple[Region, ...]:
    """The regions of ``stack`` that ``layer`` has: its layers may be of several kinds."""
    names = {name for name, _ in layer.named_modules()}
    return tuple(region for region in stack.regions if {region.row, *region.columns} <= names)


def experts_in(layer: nn.Module, stack: Stack) -> Experts | None:
    """The experts of ``stack``, if ``layer`` has them."""
    has_some = stack.experts is not None and stack.experts.module in {name for name, _ in layer.named_modules()}
    return stack.experts if has_some else None


def score_table(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """Where ``layer`` has the table of a bias that it hands on, and the attention that makes the bias of it."""
    for path, module in layer.named_modules():
        if hasattr(module, "compute_bias") and SCORE_BIAS in argument_names(type(layer)):
            tables = (name for name, child in module.named_children() if isinstance(child, nn.Embedding))
            for name in tables:
                return f"{path}.{name}", module
    return None


def arguments_by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``module``, by the names that its class gives them."""
    return {**dict(zip(argument_names(type(module)), args, strict=False)), **kwargs}


def argument_names(kind: type[nn.Module]) -> list[str]:
    """Of the forward of a class of modules, in their order."""
    return list(inspect.signature(kind.forward).parameters)[1:]
