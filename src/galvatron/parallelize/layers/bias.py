"""Biases of attention scores that one layer makes for all (T5's relative positions), however layers are cut.

The table has an entry a head and stays whole on every rank; what layers hand on is the bias of all heads and positions,
[1, 1, N, S, S] (one dim more than the model knows, so that zeros of its own making are told from it), and attention
takes what its rank has of the heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from galvatron.core.errors import ConfigError

from ..processes.collectives import AxisGroup

DIMS = 5


def whole_bias(compute: Callable[..., Tensor], parts: int) -> Callable[..., Tensor]:
    """``compute`` (a module's, of numbers of queries and keys) for sequences of which a rank sees one of ``parts``.

    A tensor of its own: FSDP2 hangs its hooks on what a layer returns, and warns of views, which lose them.
    """

    def computed(queries: int, keys: int, *args: Any, **kwargs: Any) -> Tensor:
        bias = compute(queries * parts, keys * parts, *args, **kwargs)
        return bias.unsqueeze(0).clone(memory_format=torch.contiguous_format)

    return computed


def own_heads(bias: Tensor | None, tp: AxisGroup, ulysses: AxisGroup) -> Tensor | None:
    """[1, 1, N, S, S] → [1, N / (tp x ulysses), S, S]: this rank's; None where there is none, or zeros.

    Raises:
        ConfigError: it is a bias of the model's own making, of which nobody knows whose heads it has.
    """
    if bias is None:
        return None
    if bias.dim() != DIMS:
        if bias.requires_grad:
            raise ConfigError("a parallel model knows no bias of attention scores but T5's; train another type")
        return None
    heads = bias.shape[2] // tp.size
    dealt = heads // ulysses.size
    return bias[0].narrow(1, tp.rank * heads + ulysses.rank * dealt, dealt)


def with_bias(bias: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """What is added to scores, [1 or B, N, S, S]; ``mask``: whom a query sees, by default all, or all before it."""
    if mask is None and causal:
        size = bias.shape[-1]
        mask = torch.ones(size, size, dtype=torch.bool, device=bias.device).tril()
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))
