"""Recompute: what a layer's backward pass runs again instead of keeping it from the forward pass.

Every level runs more again than the one before it, and keeps less beside the layer's input:

* ``selective`` keeps the outputs of linears and of attention; norms, rotary positions, activations, gathers of the
  sequence (Korthikanti et al. 2022) and experts run again;
* ``mlp`` keeps none of the last region's: all of the MLP runs again;
* ``linears`` keeps attention's output alone: all linears run again;
* ``full`` keeps nothing (Chen et al. 2016).

Where nothing in the layer needs the output of its last product, none repeats or keeps that; where a norm, a factor or
dropout follows it, they treat it as any other.  Under tensor parallelism a row-cut product is whole and partial: what
is kept of it is the ranks' sum, by all levels but ``full``, since it took a message.

A layer calls its linears in the order of its family's regions, so that their place tells them apart: eagerly, and in a
compiled graph, where their modules are no more.  A linear with an adapter (``layers.adapters``) makes three products,
of which the second, as wide as its own and cheap to make again, is never kept.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from galvatron.core.model import Recompute
from galvatron.internals import ATTENTION, REDUCE_SCATTER
from galvatron.models import Region

from ..processes.collectives import AxisGroup
from .adapters import linears_of
from .forward import wrap_forward
from .ring import RING

_aten = torch.ops.aten
PRODUCTS: frozenset[Any] = frozenset({_aten.mm.default, _aten.addmm.default})
SUMS: frozenset[Any] = frozenset({REDUCE_SCATTER, _aten.select_copy.int})
"""Row-cut products summed over ranks (``select_copy`` where one rank runs alone)."""


@dataclass(frozen=True)
class Kept:
    """Which outputs of a layer's products and sums are kept, by their order; attention's always is."""

    products: frozenset[int]
    sums: frozenset[int]


def recompute_in_backward(
    layer: nn.Module,
    regions: tuple[Region, ...],
    tp: AxisGroup,
    recompute: Recompute,
    *,
    has_experts: bool = False,
    needs_output: bool = False,
) -> None:
    """Let ``layer`` of these ``regions``, already cut by ``tp``, keep no more than ``recompute`` says.

    ``needs_output``: whether its backward needs what the last of them comes to.
    """
    if recompute == "none":
        return
    again = partial(checkpoint, use_reentrant=False)
    if recompute != "full":
        products = tuple(
            (sum((_products(layer, name) for name in region.columns), ()), _products(layer, region.row))
            for region in regions
        )
        if has_experts:
            products += (((), (True,)),)  # which are of another kind, and always run again
        ends = needs_output and not has_experts
        again = partial(again, context_fn=partial(_contexts, kept(recompute, products, summed=tp.size > 1, ends=ends)))
    wrap_forward(layer, again)


Products = tuple[bool, ...]
"""Of linears in running order; whether each is kept where linears are."""


def _products(layer: nn.Module, linear: str) -> Products:
    return tuple(".lora_B." not in path for path, _ in linears_of(layer, linear))


@lru_cache  # one for all layers that are alike, or they would not share a graph when compiled
def kept(
    recompute: Recompute, regions: tuple[tuple[Products, Products], ...], *, summed: bool, ends: bool = False
) -> Kept:
    """What is kept of regions of so many column-cut and row-cut products.

    ``summed``: over tensor-parallel ranks; ``ends``: whether what the last region comes to is needed.
    """
    products, sums, first = set[int](), set[int](), 0
    for index, (columns, rows) in enumerate(regions[:-1]):
        if recompute != "linears":
            products |= _places(first, columns)
            if not summed:
                products |= _places(first + len(columns), rows)
        if summed:
            sums.add(index)
        first += len(columns) + len(rows)
    if recompute == "selective" and regions:  # of the last region, the MLP
        columns, rows = regions[-1]
        products |= _places(first, columns)
        if ends and not summed:
            products |= _places(first + len(columns), rows)
    if ends and summed and regions:
        sums.add(len(regions) - 1)
    return Kept(frozenset(products), frozenset(sums))


def _places(first: int, flags: Products) -> set[int]:
    return {first + place for place, is_kept in enumerate(flags) if is_kept}


def _contexts(kept: Kept) -> Any:
    return create_selective_checkpoint_contexts(_Policy(kept))


class _Policy:
    """Tells of every operation of one pass through a layer whether its output is kept."""

    def __init__(self, kept: Kept) -> None:
        self.kept, self.seen = kept, Counter[tuple[str, bool]]()

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = "products" if op in PRODUCTS else "sums" if op in SUMS else ""
        at = self.seen[name, context.is_recompute]
        self.seen[name, context.is_recompute] += 1
        is_kept = at in getattr(self.kept, name) if name else op in ATTENTION or op is RING
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
