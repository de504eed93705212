"""Products of layers in float8, by torchao: input, weight and gradient of the output are scaled and rounded as a whole.

What is computed beside products stays in the plan's precision; parameters stay float32, and embedding and head as they
are.  Scales are powers of two, so that rounding does not depend on how a plan cuts a tensor, but for values 2^15 times
smaller than its largest.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn
from transformers import PreTrainedModel

from galvatron.core.errors import ConfigError
from galvatron.core.model import LayerKind, Precision
from galvatron.models import Family, chain_of
from galvatron.models.lora import has_adapters

LEAST_CAPABILITY = (8, 9)  # NVIDIA Ada, the first with float8 tensor cores
BLOCK = 16  # torch._scaled_mm takes rows of a multiple of 16 bytes
EMULATED = False
"""Round to float8 and multiply in the plan's precision, whatever that and the device: for tests."""


def check_fp8(model: PreTrainedModel, family: Family, device: torch.device, precision: Precision) -> None:
    """Raise ConfigError unless layers of ``model`` can multiply in float8 on ``device``, beside ``precision``."""
    if has_adapters(model):
        raise ConfigError("fp8 products are not made beside LoRA adapters; leave fp8 out, or merge the adapters first")
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("fp8 needs torchao, which is not installed; pip install 'galvatron[fp8]'")
    if precision != "bf16" and not EMULATED:
        raise ConfigError(f"fp8 products go with precision=bf16 for all else, got {precision}; set it to bf16")
    if not EMULATED and (device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise ConfigError(
            f"fp8 needs devices of compute capability {'.'.join(map(str, LEAST_CAPABILITY))} or above (Ada, Hopper and "
            f"later), got {name}; leave it out"
        )
    layer = model.get_submodule(chain_of(model, family)[0].path)
    if not any(isinstance(module, nn.Linear) for module in layer.modules()):
        raise ConfigError(f"fp8 takes layers with torch's linears, and {type(layer).__name__} has none; leave it out")


def fp8_problem(kind: LayerKind, tp: int, tokens: int) -> str | None:
    """Why a rank's products have sizes that float8 kernels do not take, as a sentence; None if they do.

    ``tokens``: of a sequence on one of ``tp`` ranks, gathered.
    """
    for parameter in kind.parameters:
        sizes = parameter.local_shape(tp)
        if len(sizes) == 2 and any(size % BLOCK for size in (tokens, *sizes)):
            return (
                f"fp8 products need sizes that {BLOCK} divides, but with tp={tp} and {tokens} tokens a sequence a rank "
                f"has {list(sizes)} of {parameter.name}; use less tp, or sequences of another length"
            )
    return None


def use_fp8(layer: nn.Module) -> None:
    """Let every linear of ``layer``, not cut yet, multiply in float8."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=EMULATED, round_scales_to_power_of_2=True)
    convert_to_float8_training(layer, config=config)
