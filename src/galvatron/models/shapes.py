"""Shapes that follow from a model's code alone: found by running it on meta, where nothing has values."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from galvatron.core.errors import ConfigError
from galvatron.core.family import Family, Stack

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
    """By path, how many tokens stacks see that see as many whatever the length of texts: patches of images, sounds;
    and of windows how many are in one, by the path of the first layer's attention.

    A twin of few units, but of images as large as the model's, is run; on meta where it takes nothing but images.

    Raises:
        ConfigError: it cannot be run: images of this size do not fit the model's other sizes.
    """
    if len(family.stacks) == 1:
        return {}
    key: str = config.to_json_string(use_diff=False)
    if key not in _fixed:
        try:
            _fixed[key] = _seen_tokens(config, family)
        except RuntimeError as failure:  # what torch raises where shapes are at odds
            raise ConfigError(
                f"a {config.model_type} of this config cannot run images of its size ({str(failure).splitlines()[0]}); "
                "mend its config.json"
            ) from None
    return _fixed[key]


def windowed_path(stack: Stack) -> str:
    """The path of the attention of a stack's first layer that sees windows; '' where none does."""
    entries = (region.gathering[0] for region in stack.regions if region.windows)
    return next((f"{stack.path}.0.{entry}" for entry in entries), "")


def _seen_tokens(config: PretrainedConfig, family: Family) -> dict[str, int]:
    twin = twin_config(config, keep_images=True)
    task = family.task
    device = "meta" if task == "image_classification" else "cpu"
    model = twin_model(twin).to(device)  # type: ignore[arg-type]
    length = (image_length(twin) if task == "vision_language" else 0) + SEQ_LEN + 1
    seeing = {stack.path: f"{stack.path}.0" for stack in family.stacks}
    seeing |= {path: path for path in map(windowed_path, family.stacks) if path}
    found: dict[str, list[int]] = {name: [] for name in seeing}
    for name, path in seeing.items():

        def note(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            found[name].append((args[0] if args else kwargs["hidden_states"]).shape[1])

        model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        for longer in (0, 2):
            run_twin(model, blank_inputs(twin, task, 1, length + longer, device))
    return {name: first for name, (first, second) in found.items() if first == second}


def _stop(hidden: Tensor, *_: Any, **__: Any) -> None:
    raise Reached(hidden)


def _stop_after(module: nn.Module, args: Any, output: Tensor) -> None:
    raise Reached(output)


def emptied(module: nn.Module) -> None:
    """Take a module's own parameters, which another process has: what stays is of their dtype, without elements."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(torch.empty(0, dtype=parameter.dtype), requires_grad=False))
