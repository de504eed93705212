"""Shapes that follow from a model's code alone: found by running it on meta, where nothing has values."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from galvatron.core.family import Family

from .chain import chain_of
from .inputs import blank_inputs


class Reached(Exception):
    """A forward pass has come to where it shall end, with ``value``."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def entering_tokens(model: PreTrainedModel, family: Family) -> int:
    """How many tokens an image becomes before the first layer of ``model``."""
    twin = copy.deepcopy(model).to(device="meta")  # type: ignore[call-arg]
    twin.get_submodule(chain_of(twin, family)[0].path).forward = _stop
    try:
        twin(**blank_inputs(model.config, family.task, 1, 1, "meta"))
    except Reached as reached:
        hidden: Tensor = reached.value
        return hidden.shape[1]
    raise AssertionError(f"{type(model).__name__} runs without its layers")


def _stop(hidden: Tensor, *_: Any, **__: Any) -> None:
    raise Reached(hidden)


def emptied(module: nn.Module) -> None:
    """Take a module's own parameters, which another process has: what stays is of their dtype, without elements."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(torch.empty(0, dtype=parameter.dtype), requires_grad=False))
