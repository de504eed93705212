"""Layers that attend by themselves are told of masks and biases by the model's forward: of its rows, not of theirs.

Such layers are given no padding (``checks.packing``), so that all rows are told the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from galvatron.internals import tree_map_only
from galvatron.models.chain import arguments_by_name

from .forward import wrap_forward

MASKS = ("attention_mask", "encoder_attention_mask")
"""Arguments [rows, ...]; what else has as many entries by chance (MPT's biases [heads, ...]) stays."""


def told_of_own_rows(layer: nn.Module, biases: Collection[str], num_heads: int) -> None:
    """Let ``layer`` see masks of as many rows as its hidden states, and ``biases`` [rows x ``num_heads``, ...]."""

    def own(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        named = arguments_by_name(layer, args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        rows, told = len(hidden), _rows(named.get(MASKS[0]))
        if told in (1, rows):
            return forward(*args, **kwargs)
        counts = dict.fromkeys(MASKS, told) | dict.fromkeys(biases, told * num_heads)
        alike = [named[name] for name, count in counts.items() if _rows(named.get(name)) == count]

        def part(given: Tensor) -> Tensor:
            if not any(given is one for one in alike):
                return given
            first = given.unflatten(0, (told, -1))[:1]
            return first.expand(rows, *first.shape[1:]).flatten(0, 1)

        args, kwargs = tree_map_only(Tensor, part, (args, kwargs))
        return forward(*args, **kwargs)

    wrap_forward(layer, own)


def _rows(given: Any) -> int:
    """How many entries a tensor has; 1 where there is none."""
    return len(given) if isinstance(given, Tensor) else 1
