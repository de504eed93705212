"""The attention function that Hugging Face modules call, through the transformers registry.

Causal, on the local heads of whole sequences; a sliding window becomes a mask only where it is shorter
than the sequence.  Masks are described, never materialised by the model: documents are packed, not padded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from galvatron.internals import call_attention

NAME = "galvatron"


def use_attention(model: PreTrainedModel) -> None:
    """Make every attention module of ``model`` call ``attention`` (registered once under ``NAME``)."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    call_attention(model.config, NAME)


def attention(
    module: nn.Module,
    query_BNSD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of N query heads over K key/value heads (K divides N); returns ([B, S, N, D], None)."""
    seq_len = query_BNSD.shape[2]
    mask = None
    if sliding_window is not None and sliding_window < seq_len:
        mask = _window_mask(seq_len, sliding_window, query_BNSD.device)
    out_BNSD = F.scaled_dot_product_attention(
        query_BNSD,
        key_BKSD,
        value_BKSD,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query_BNSD.shape[1] != key_BKSD.shape[1],
    )
    return out_BNSD.transpose(1, 2).contiguous(), None


def _window_mask(seq_len: int, window: int, device: torch.device) -> Tensor:
    """[S, S] bool: position i sees i - window + 1 ... i."""
    distance = torch.arange(seq_len, device=device)[:, None] - torch.arange(seq_len, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def _no_mask(*_: Any, **__: Any) -> None:
    return None
