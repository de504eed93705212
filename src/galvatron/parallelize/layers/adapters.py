"""LoRA adapters as layers run them: W x + s · B A x, by the linears that peft made.

Takes layers with peft's modules; replaces these modules' forward and nothing else.  What peft's own does beside (many
adapters, merged weights, casts) is refused before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from galvatron.models.lora import adapted, base_linear


def run_adapters(layer: nn.Module) -> None:
    """Let every adapter of ``layer`` run before the linear it is beside.

    In this order recompute, which stops at the last tensor that the backward needs, never repeats a last product with a
    frozen weight.
    """
    for _, module in adapted(layer):
        module.forward = _adapted_forward(module)


def _adapted_forward(module: Any) -> Callable[[Tensor], Tensor]:
    (name,) = module.lora_A
    down, up = module.lora_A[name], module.lora_B[name]
    dropout, scaling = module.lora_dropout[name], module.scaling[name]
    base = base_linear(module)

    def forward(x: Tensor) -> Tensor:
        added: Tensor = up(down(dropout(x)) * scaling)
        return added + base(x)

    return forward


def linears_of(layer: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """(path, linear) of what is a linear at ``path``: itself, or A, B and the base of an adapter, in running order."""
    module = layer.get_submodule(path)
    base = base_linear(module)
    if base is module:
        yield path, module
        return
    for part in ("lora_A", "lora_B"):
        yield from ((f"{path}.{part}.{name}", linear) for name, linear in getattr(module, part).items())
    yield f"{path}.base_layer", base
