"""Buffers that belong to a model as its weights do: files have them, and no formula gives them (biases of routers)."""

from __future__ import annotations

from torch import Tensor, nn


def lasting_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The floating-point buffers of ``module`` that a file of its weights has, by name."""
    saved = module.state_dict(keep_vars=True)
    return {
        name: value
        for name, value in saved.items()
        if not isinstance(value, nn.Parameter) and isinstance(value, Tensor) and value.is_floating_point()
    }
