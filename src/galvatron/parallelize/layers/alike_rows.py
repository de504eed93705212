"""Layers that attend by themselves are told of masks and biases by the model's forward: of its rows, not of theirs.

Such layers are given no padding (``checks.packing``), so that all rows are told the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from galvatron.internals import tree_map_only
from galvatron.models.chain import arguments_by_name

from .forward import wrap_forward

MASK = "attention_mask"


def told_of_own_rows(layer: nn.Module, side: str | None) -> None:
    """Let ``layer`` see masks and biases [rows, ...] or [rows x heads, ...] of as many rows as its hidden states.

    ``side``: the argument that another stack's states are, whose rows are not alike and are the layer's own already.
    """

    def own(forward: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        named = arguments_by_name(layer, args, kwargs)
        mask, states = named.get(MASK), named.get(side) if side else None
        rows, told = len(hidden), len(mask) if isinstance(mask, Tensor) else 1
        if told in (1, rows):
            return forward(*args, **kwargs)

        def part(given: Tensor) -> Tensor:
            if given is hidden or given is states or given.dim() < 2 or len(given) % told:
                return given
            one = given.unflatten(0, (told, -1))[:1]
            return one.expand(rows, *one.shape[1:]).flatten(0, 1)

        args, kwargs = tree_map_only(Tensor, part, (args, kwargs))
        return forward(*args, **kwargs)

    wrap_forward(layer, own)
