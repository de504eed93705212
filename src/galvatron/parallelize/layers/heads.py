"""A rank's own heads: what an attention that is cut counts, and what it is given for each."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from galvatron.internals import call_attention, called_attention
from galvatron.models import Region
from galvatron.models.heads import HEAD_COUNTS, KV_HEAD_COUNTS

from ..processes.collectives import AxisGroup

WIDTHS = ("split_size", "all_head_size", "embed_dim", "hidden_size", "inner_dim")
"""Attributes of attention modules that count the elements of all heads."""


def linears_of_region(layer: nn.Module, region: Region) -> set[int]:
    """The ids of all modules that are cut, and of what adapters wrap."""
    return {id(part) for path in (*region.columns, region.row) for part in layer.get_submodule(path).modules()}


def count_own_heads(attention: nn.Module, cut: set[int], tp: AxisGroup) -> None:
    """Let attributes and a config of the module's own count this rank's heads; but of parts whose linears stay whole
    (``cut``: the ids of those that do not).
    """
    for module in attention.modules():
        linears = [id(part) for part in module.modules() if isinstance(part, (nn.Linear, Conv1D))]
        if linears and not cut & set(linears):
            continue
        counted: list[Any] = [module]
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            module.config = copy.deepcopy(config)  # type: ignore[assignment]
            called = called_attention(config)
            if called is not None:
                call_attention(module.config, called)  # type: ignore[arg-type]
            counted.append(module.config)
        for holder, name in itertools.product(counted, (*HEAD_COUNTS, *WIDTHS, *KV_HEAD_COUNTS)):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                setattr(holder, name, max(value // tp.size, 1) if name in KV_HEAD_COUNTS else value // tp.size)


def own_heads_of_inputs(
    dims: Mapping[str, int], heads: int, tp: AxisGroup, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Run with this rank's heads of arguments that have an entry a head, in a dim that may count samples too."""
    for name, dim in dims.items():
        if kwargs.get(name) is not None:
            by_head = kwargs[name].unflatten(dim, (-1, heads))
            own = by_head.narrow(dim + 1, tp.rank * heads // tp.size, heads // tp.size)
            kwargs[name] = own.flatten(dim, dim + 1)
    return forward(*args, **kwargs)
