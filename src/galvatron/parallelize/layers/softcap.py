"""Attention whose scores are capped (Gemma 2): fused kernels have no cap, so scores exist, one layer's at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def capped_attention(
    query_BNSD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    mask: Tensor | None,
    soft_cap: float,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """softmax(cap x tanh(scores / cap)) of the values, [B, N, S, D]; ``mask`` [..., S, S], None: causal.

    K heads of keys and values serve N / K queries each.
    """
    heads, seq_len, head_dim = query_BNSD.shape[1:]
    groups = heads // key_BKSD.shape[1]
    if mask is None:
        mask = torch.ones(seq_len, seq_len, dtype=torch.bool, device=query_BNSD.device).tril()
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key_BKSD, value_BKSD))
    scores = query_BNSD @ key.transpose(2, 3) * (head_dim**-0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / soft_cap) * soft_cap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query_BNSD.dtype)
    return F.dropout(weights, p=dropout) @ value
