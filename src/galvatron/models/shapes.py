"""Shapes that follow from a model's code alone: found by running it on meta, where nothing has values."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from galvatron.core.family import Family

from .chain import chain_of
from .images import image_length
from .inputs import blank_inputs
from .sizes import SEQ_LEN
from .twin import run_twin, twin_config, twin_model

_fixed: dict[str, dict[str, int]] = {}


class Reached(Exception):
    """A forward pass has come to where it shall end, with ``value``."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def entering_tokens(model: PreTrainedModel, family: Family) -> int:
    """How many tokens an image becomes before the first layer of ``model``."""
    twin = copy.deepcopy(model).to(device="meta")  # type: ignore[call-arg]
    twin.get_submodule(chain_of(twin, family)[0].path).forward = _stop
    return _reached(twin, family).shape[1]


def pooled_width(model: PreTrainedModel, path: str, family: Family) -> int:
    """How many units the output of the module at ``path`` has."""
    twin = copy.deepcopy(model).to(device="meta")  # type: ignore[call-arg]
    twin.get_submodule(path).register_forward_hook(_stop_after)
    return _reached(twin, family).shape[-1]


def _reached(twin: PreTrainedModel, family: Family) -> Tensor:
    try:
        twin(**blank_inputs(twin.config, family.task, 1, 1, "meta"))
    except Reached as reached:
        value: Tensor = reached.value
        return value
    raise AssertionError(f"{type(twin).__name__} runs without its layers")


def fixed_tokens(config: PretrainedConfig, family: Family) -> dict[str, int]:
    """By path, how many tokens stacks see that see as many whatever the length of texts: patches of images, sounds.

    A twin of few units, but of images as large as the model's, is run.
    """
    if len(family.stacks) == 1:
        return {}
    key: str = config.to_json_string(use_diff=False)
    if key not in _fixed:
        _fixed[key] = _seen_tokens(config, family)
    return _fixed[key]


def _seen_tokens(config: PretrainedConfig, family: Family) -> dict[str, int]:
    found: dict[str, list[int]] = {stack.path: [] for stack in family.stacks}
    twin = twin_config(config, keep_images=True)
    model, task = twin_model(twin), family.task
    length = (image_length(twin) if task == "vision_language" else 0) + SEQ_LEN + 1
    for stack in family.stacks:

        def note(module: nn.Module, args: Any, kwargs: Any, path: str = stack.path) -> None:
            found[path].append((args[0] if args else kwargs["hidden_states"]).shape[1])

        model.get_submodule(f"{stack.path}.0").register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        for longer in (0, 2):
            run_twin(model, blank_inputs(twin, task, 1, length + longer))
    return {path: first for path, (first, second) in found.items() if first == second}


def _stop(hidden: Tensor, *_: Any, **__: Any) -> None:
    raise Reached(hidden)


def _stop_after(module: nn.Module, args: Any, output: Tensor) -> None:
    raise Reached(output)


def emptied(module: nn.Module) -> None:
    """Take a module's own parameters, which another process has: what stays is of their dtype, without elements."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(torch.empty(0, dtype=parameter.dtype), requires_grad=False))
