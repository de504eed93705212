"""Experts across ranks, at the seam between a router and a module of experts, which stay as they are.

T tokens of hidden size H, each sent to k experts with k weights.  Under tensor parallelism every rank holds a part of
the width of every expert, so it needs the tokens of all of them, and its products are partial sums.  Routers work on a
rank's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..processes.collectives import AxisGroup
from ..processes.rows import gather_rows, reduce_scatter_rows
from .forward import wrap_forward


def share_experts(experts: nn.Module, tp: AxisGroup) -> None:
    """Let ``experts``, already cut by ``tp``, take its ranks' tokens and give their own ones' sums."""

    def share(
        forward: Callable[..., Tensor], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        # one message for both: numbers of experts are small
        routes_T2k = gather_rows(torch.cat([top_k_weights.float(), top_k_index.float()], dim=1), tp)
        weights_Tk, index_Tk = routes_T2k.chunk(2, dim=1)
        tokens_TH = gather_rows(hidden_states, tp)
        partial_TH = forward(tokens_TH, index_Tk.long(), weights_Tk.to(top_k_weights.dtype))
        return reduce_scatter_rows(partial_TH, tp)

    wrap_forward(experts, share)
