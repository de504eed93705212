"""Tiny models whose weights hide nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from galvatron.models import auto_class, buffers_within

from .families import tiny_config

WEIGHT_STD = 0.15
"""Standard deviation of drawn weights, about 1/√hidden: every layer changes its input visibly."""


def tiny_model(family: str | PretrainedConfig, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """An unmodified Hugging Face model, float32 on the CPU, all weights drawn from ``seed``.

    Hugging Face starts biases at zero and norms at one, values under which a lost bias or a doubled norm
    goes unseen; here biases and the offsets of norm weights from one are random too.
    """
    config = tiny_config(family, **overrides) if isinstance(family, str) else copy.deepcopy(family)
    return draw_weights(auto_class(config).from_config(config, dtype=torch.float32), seed)


@torch.no_grad()
def draw_weights(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Draw every parameter of ``model`` in place, in the order of ``named_parameters``, and what else files have."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * WEIGHT_STD
        is_norm_weight = parameter.dim() == 1 and name.endswith("weight")
        is_scale = parameter.dim() == 0  # of a contrast: as if all pairs were alike, gradients would cancel
        parameter.copy_(noise + 1 if is_norm_weight else noise + 2 if is_scale else noise)
    for buffer in buffers_within(model).values():  # others have to be zeros
        buffer.copy_(torch.randn(buffer.shape, generator=generator) * WEIGHT_STD)
    return model
