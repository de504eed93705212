"""Paths dropped for whole samples (stochastic depth) where sequences are cut: all ranks of a sample drop alike.

Every rank draws, as it does for all dropout; what the first rank of a sequence has drawn counts for all of them, one
number a sample, gathered.  A layer that is computed again draws as in its first run, so it drops alike again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from galvatron.internals import all_gather

from ..processes.collectives import AxisGroup
from .forward import wrap_forward


def drop_alike(layer: nn.Module, axes: AxisGroup) -> None:
    """Let ``layer`` drop the same samples' paths on all ranks of ``axes``, which share sequences."""
    if axes.size == 1:
        return
    assert isinstance(axes.group, dist.ProcessGroup)
    for module in layer.modules():
        if type(module).__name__.endswith("DropPath"):  # every type of transformers has one of its own
            wrap_forward(module, partial(_dropped, module, axes.group))


def _dropped(module: Any, group: dist.ProcessGroup, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    if not module.training or not module.drop_prob:
        return forward(hidden)
    drawn = forward(hidden.new_ones(hidden.shape[0], *(1 for _ in hidden.shape[1:])))
    return hidden * all_gather(drawn, group)[: len(drawn)]
