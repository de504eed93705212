"""Tower: what sees a batch's images as patches, one after the other, within the embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..numbers import Count, Whole
from ..records import Record


class Tower(Record):
    """What sees a batch's images as patches, one after the other (``core.family.Outline.tower``).

    Attributes:
        layers: the path of its list of layers; their parameters are the embedding's.
        num_heads: of one layer.
        merge: the side, in patches, of the square that a token of a text stands for.
        window: patches that one sees, in all layers but ``whole_layers``; 0: all of its image.
    """

    layers: str
    num_heads: Count
    merge: Count
    window: Whole = 0
    whole_layers: Whole = 0

    @property
    def within(self) -> str:
        """How the names of all its parameters begin."""
        return f"{self.layers.rpartition('.')[0]}."

    def image_tokens(self, seq_len: int) -> int:
        """Tokens of a text that stand for images, as profiles take it: for a square one, half of them or less."""
        return math.isqrt(seq_len // 2) ** 2


def windows_of(vision: Mapping[str, Any]) -> dict[str, int]:
    """``window`` and ``whole_layers`` by the configuration of what sees; nothing where all layers see all."""
    window, patch, whole = (vision.get(name) for name in ("window_size", "patch_size", "fullatt_block_indexes"))
    if not isinstance(window, int) or not isinstance(patch, int) or not isinstance(whole, (list, tuple)):
        return {}
    return {"window": (window // patch) ** 2, "whole_layers": len(whole)}
