"""Models and configs of transformers."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks


@contextmanager
def without_value_checks() -> Iterator[None]:
    """Let models of transformers not look at values (that a text has as many image tokens as its images make)."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def call_attention(config: PretrainedConfig, name: str) -> None:
    """Make the modules built from ``config`` call the attention registered as ``name``, without checking the name."""
    config._attn_implementation = name


def called_attention(config: PretrainedConfig) -> str | None:
    """The name of the attention that modules built from ``config`` call."""
    name: str | None = config._attn_implementation
    return name


def multiply_one_by_one(experts: nn.Module) -> None:
    """Let a module of ``experts`` go through its experts in a loop, whatever its model's config says."""
    config = getattr(experts, "config", None)
    if isinstance(config, PretrainedConfig):
        own = copy.deepcopy(config)
        own._experts_implementation = "eager"
        experts.config = own  # type: ignore[assignment]


def record_layers_alone(model: PreTrainedModel, layers: Iterable[nn.Module]) -> None:
    """Let ``model`` record what its layers give, as a later call may ask it to, but nothing inside of ``layers``.

    What would record attentions has hooks there, which torch.compile cannot trace on torch 2.11.
    """
    maybe_install_capturing_hooks(model)
    for module in itertools.chain.from_iterable(layer.children() for layer in layers):
        for part in module.modules():
            for key, hook in list(part._forward_hooks.items()):
                if hook.__module__ == maybe_install_capturing_hooks.__module__:
                    del part._forward_hooks[key]


def to_be_initialised(module: nn.Module) -> None:
    """Let transformers initialise a module that it has initialised before."""
    module._is_hf_initialized = False  # type: ignore[assignment]


def needless_names(model: PreTrainedModel) -> list[str]:
    """Patterns of tensors that old files have and ``model`` computes itself: masks, rotary tables, positions."""
    return [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]


def model_mapping(auto_class: Any) -> Any:
    """From a config's class to the class, or classes, of models that an auto class of transformers builds."""
    return auto_class._model_mapping


def model_types(auto_class: Any) -> list[str]:
    """The types of models that an auto class of transformers builds."""
    return list(auto_class._model_mapping._model_mapping)
