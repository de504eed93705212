"""Models and configs of transformers."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


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
