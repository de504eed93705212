"""Recompute: what a layer's backward pass runs again instead of keeping it from the forward pass.

Every level runs more again than the one before it, and keeps less beside the layer's input:

* ``selective`` keeps the outputs of linears and of attention; norms, rotary positions, activations, gathers of the
  sequence (Korthikanti et al. 2022) and experts run again;
* ``mlp`` keeps none of the last region's: all of the MLP runs again;
* ``linears`` keeps attention's output alone: all linears run again;
* ``full`` keeps nothing (Chen et al. 2016).

None repeats the layer's last product: nothing in the layer needs its output.  Under tensor parallelism a row-cut
product is whole and partial: what is kept of it is the ranks' sum, by all levels but ``full``, since it took a message.

A layer calls its linears in the order of its family's regions, so that their place tells them apart: eagerly, and in a
compiled graph, where their modules are no more.
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
    layer: nn.Module, regions: tuple[Region, ...], tp: AxisGroup, recompute: Recompute, *, has_experts: bool = False
) -> None:
    """Let ``layer`` of these ``regions``, already cut by ``tp``, keep no more than ``recompute`` says."""
    if recompute == "none":
        return
    again = partial(checkpoint, use_reentrant=False)
    if recompute != "full":
        linears = tuple((len(region.columns), 1) for region in regions)
        if has_experts:
            linears += ((0, 1),)  # whose products are of another kind
        again = partial(again, context_fn=partial(_contexts, kept(recompute, linears, summed=tp.size > 1)))
    wrap_forward(layer, again)


@lru_cache  # one for all layers that are alike, or they would not share a graph when compiled
def kept(recompute: Recompute, linears: tuple[tuple[int, int], ...], *, summed: bool) -> Kept:
    """What is kept of regions of so many column-cut and row-cut ``linears``; ``summed``: over tensor-parallel ranks."""
    products, sums, product, row = set[int](), set[int](), 0, 0
    for columns, rows in linears[:-1]:
        if recompute != "linears":
            products.update(range(product, product + columns))
        if summed:
            sums.update(range(row, row + rows))
        elif recompute != "linears":
            products.update(range(product + columns, product + columns + rows))
        product, row = product + columns + rows, row + rows
    if recompute == "selective" and linears:  # of the last region, the MLP; nothing needs its output
        products.update(range(product, product + linears[-1][0]))
    return Kept(frozenset(products), frozenset(sums))


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
