"""Buffers that belong to a model as its weights do: files have them, and no formula gives them (biases of routers)."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel


def lasting_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The floating-point buffers of ``module`` that a file of its weights has, by name."""
    saved = module.state_dict(keep_vars=True)
    return {
        name: value
        for name, value in saved.items()
        if not isinstance(value, nn.Parameter) and isinstance(value, Tensor) and value.is_floating_point()
    }


def buffers_within(model: PreTrainedModel) -> dict[str, Tensor]:
    """Those that some module within ``model`` has."""
    return {name: value for name, value in lasting_buffers(model).items() if "." in name}


def buffers_after_head(model: PreTrainedModel) -> dict[str, Tensor]:
    """Those that no module of ``model`` has but it itself: it adds them to what its head gives (BART's, Marian's)."""
    return {name: value for name, value in lasting_buffers(model).items() if "." not in name}
