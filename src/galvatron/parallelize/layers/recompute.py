"""Recompute: what a layer's backward pass runs again instead of keeping it from the forward pass.

``selective`` keeps the outputs of matrix products and of attention and runs the rest again (norms, rotary positions,
activations, gathers of the sequence); ``full`` keeps the layer's input and runs all of it again (Korthikanti et al.
2022; Chen et al. 2016).  Neither repeats the layer's last product: nothing in the layer needs its output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from galvatron.core.model import Recompute
from galvatron.internals import ATTENTION, REDUCE_SCATTER
from galvatron.models import Family

from ..processes.collectives import AxisGroup
from .forward import wrap_forward

_aten = torch.ops.aten
PRODUCTS: frozenset[Any] = frozenset({_aten.mm.default, _aten.addmm.default})
SCATTERS: frozenset[Any] = frozenset({REDUCE_SCATTER, _aten.select_copy.int})
"""What takes the place of a row-cut product's output: its sum, cut (``select_copy`` where one rank runs alone)."""
EVERYTHING = PRODUCTS | ATTENTION | SCATTERS
NOTHING: frozenset[Any] = frozenset()


class _Keeper:
    """Which operations' outputs a selective layer keeps just now."""

    kept = EVERYTHING

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in self.kept else CheckpointPolicy.PREFER_RECOMPUTE


_everything = _Keeper()  # one for all layers that are compiled, or they would not share a graph


def recompute_in_backward(
    layer: nn.Module, family: Family, tp: AxisGroup, recompute: Recompute, *, compiled: bool = False
) -> None:
    """Let ``layer``, already cut by ``tp``, keep no more than ``recompute`` says; ``compiled``: it will be compiled.

    The compiler finds out by itself which outputs nothing needs.
    """
    if recompute == "none":
        return
    again = partial(checkpoint, use_reentrant=False)
    if recompute == "selective":
        keeper = _everything if compiled else _Keeper()
        if not compiled:
            _keep_sums_of_rows(layer, family, tp, keeper)
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, keeper))
    wrap_forward(layer, again)


def _keep_sums_of_rows(layer: nn.Module, family: Family, tp: AxisGroup, keeper: _Keeper) -> None:
    """Row-cut products are whole and partial: keep what they are reduced to, and of the last one nothing."""
    for region in family.regions:
        kept = NOTHING if region is family.regions[-1] else SCATTERS if tp.size > 1 else EVERYTHING
        for name in region.rows:
            wrap_forward(layer.get_submodule(f"{region.module}.{name}"), partial(_keeping, keeper, kept))


def _keeping(keeper: _Keeper, kept: frozenset[Any], forward: Callable[..., Tensor], *args: Any) -> Tensor:
    keeper.kept = kept
    try:
        return forward(*args)
    finally:
        keeper.kept = EVERYTHING
