"""Norms over the whole width of queries or keys (OLMo 2) while each rank has its own heads alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..processes.collectives import AxisGroup, sum_of_ranks


def wide_norm_forward(norm: nn.Module, tp: AxisGroup) -> Callable[[Tensor], Tensor]:
    """Forward of an RMS norm whose weight is cut: the mean of squares is that of all ranks, in float32.

    It takes and gives [..., width / tp].
    """
    eps: Any = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 0.0)

    def forward(x: Tensor) -> Tensor:
        wide = x.float()
        squares = sum_of_ranks(wide.square().sum(dim=-1, keepdim=True), tp)
        normed = wide * torch.rsqrt(squares / (x.shape[-1] * tp.size) + eps)
        return (norm.weight * normed).to(x.dtype)  # type: ignore[operator]

    return forward
