"""torch.compile for layers: equal layers share one graph, and none is made again after the first step.

What is compiled is a layer's own forward, its tensor-parallel collectives and its recompute inside the graph; changes
of layout and FSDP2's hooks stay outside.  Dynamo keeps graphs with the *code object* that it compiled, and gives up
after a few of them: layers of one strategy share a code object, each strategy of each model has one of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from galvatron.core.errors import ConfigError
from galvatron.core.model import ModelSpec
from galvatron.internals import keep_graphs, leave_out_advice

BACKEND = "inductor"
GRAPHS = 32
"""Of one strategy: training and evaluation, with and without a gradient of the input; in a profile every batch."""


def compiles(wanted: bool | None, device: torch.device, spec: ModelSpec) -> bool:
    """Whether layers are compiled on ``device``: as ``wanted``, by default on CUDA alone, and never with experts.

    Raises:
        ConfigError: they are wanted compiled and have experts.
    """
    if not any(kind.num_experts for kind in spec.layers):
        return device.type == "cuda" if wanted is None else wanted
    if wanted:
        raise ConfigError(f"layers of {spec.name} send tokens to experts by their values; leave compile out")
    return False


class LayerCompiler:
    """Compiles the layers of one model, by default to code of the device."""

    def __init__(self, backend: str | None = None) -> None:
        self._backend = backend or BACKEND
        self._codes: dict[Hashable, CodeType] = {}
        keep_graphs(GRAPHS)
        leave_out_advice()

    def __call__(self, layer: nn.Module, alike: Hashable) -> None:
        """Compile ``layer``'s forward; layers that are ``alike`` see equal shapes and share their graphs."""
        call = _calling(layer.forward)
        code = self._codes.setdefault(alike, call.__code__.replace(co_name=f"layer_{len(self._codes)}"))
        own = FunctionType(code, globals(), code.co_name, None, call.__closure__)
        layer.forward = torch.compile(own, fullgraph=True, dynamic=False, backend=self._backend)


def _calling(forward: Callable[..., Any]) -> FunctionType:
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    assert isinstance(call, FunctionType)
    return call
