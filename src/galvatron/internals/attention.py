"""Fused attention: its kernels with log-sum-exp, forward and backward, and by bounds of documents."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn

_aten = torch.ops.aten
ATTENTION: frozenset[Any] = frozenset(
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    for name in (
        "flash_attention_for_cpu",
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
) | {torch.ops.torch_attn._varlen_attn.default}
"""The dispatched operations of fused attention on any device."""
LSE_ALIGNMENT, BIAS_ALIGNMENT = 32, 16
"""To multiples of which efficient attention rounds up rows of its log-sum-exp, and takes columns of a bias."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    causal: bool,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by a fused kernel: (output [B, N, S, D], log-sum-exp [B, N, S] in float32 or wider).

    Queries [B, N, S, D], keys and values [B, K, T, D] (K divides N); ``mask`` [S, T] or [B, 1, S, T]: which keys a
    query sees.  One that sees none has zeros and -inf.  Values may have another head size than keys; kernels are given
    zeros to make them equal.
    """
    values = value.shape[-1]
    query, key, value = _widened(query, key, value)
    bias = _bias(query, key, causal=causal, mask=mask)
    if query.device.type == "cpu":
        out, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal and bias is None, attn_mask=bias, scale=scale
        )
    elif bias is None:
        out, log_sum, *_ = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
    else:
        key, value = _as_many_heads(query, key), _as_many_heads(query, value)
        bias = bias.expand(*query.shape[:2], -1, -1)
        out, log_sum, *_ = _aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scale)
        log_sum = log_sum[:, :, : query.shape[2]]
    out = out[..., :values]
    if mask is not None:
        sees = mask.any(dim=-1).to(query.device)
        out = torch.where(sees[..., None], out, 0.0)
        log_sum = torch.where(sees, log_sum, -torch.inf)
    return out, log_sum


def attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    scale: float,
    *,
    causal: bool,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; ``out`` and ``log_sum`` are those of all keys, of which these are some."""
    sizes = query.shape[-1], key.shape[-1], value.shape[-1]
    grad, query, key, value, out = _widened(grad, query, key, value, out)
    gradients = _attend_backward(grad, query, key, value, out, log_sum, scale, causal=causal, mask=mask)
    of_query, of_key, of_value = (found[..., :size] for found, size in zip(gradients, sizes, strict=True))
    return of_query, of_key, of_value


def _widened(*heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All of the largest head size, with zeros behind."""
    widest = max(tensor.shape[-1] for tensor in heads)
    return tuple(nn.functional.pad(tensor, (0, widest - tensor.shape[-1])) for tensor in heads)


def _attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    scale: float,
    *,
    causal: bool,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    bias = _bias(query, key, causal=causal, mask=mask)
    if query.device.type == "cpu":
        of_query, of_key, of_value = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, log_sum, 0.0, causal and bias is None, attn_mask=bias, scale=scale
        )
        return of_query, of_key, of_value
    unused, lengths = torch.zeros(2, dtype=torch.uint64, device=query.device), (query.shape[2], key.shape[2])
    if bias is None:
        of_query, of_key, of_value = _aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, out, log_sum, None, None, *lengths, 0.0, causal, unused, unused, scale=scale
        )
        return of_query, of_key, of_value
    heads = key.shape[1]
    log_sum = nn.functional.pad(log_sum, (0, -query.shape[2] % LSE_ALIGNMENT), value=torch.inf)
    key, value = _as_many_heads(query, key), _as_many_heads(query, value)
    bias = bias.expand(*query.shape[:2], -1, -1)
    of_query, of_key, of_value, _ = _aten._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, bias, out, log_sum, unused, unused, 0.0, [True, True, True, False], scale=scale
    )
    return of_query, of_key.unflatten(1, (heads, -1)).sum(2), of_value.unflatten(1, (heads, -1)).sum(2)


_HAS_VARLEN = {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()
"""Whether torch's function of documents by bounds has windows and fewer heads of keys than of queries."""


def attends_by_bounds(dtype: torch.dtype, dropout: float) -> bool:
    """Whether ``attend_by_bounds`` has a kernel for it: flash attention's, of half precisions and without dropout."""
    return dtype in (torch.bfloat16, torch.float16) and not dropout and _HAS_VARLEN


def attend_by_bounds(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention within each document, without a mask: [B, N, S, D].

    Shapes as of ``attend``; ``bounds`` [documents + 1] are of all rows, one after the other.
    """
    rows, _, tokens, _ = query.shape
    flat = [heads.transpose(1, 2).flatten(0, 1) for heads in (query, key, value)]
    left, fewer = -1 if window is None else window - 1, query.shape[1] != key.shape[1]
    attend: Any = varlen_attn
    out = attend(*flat, bounds, bounds, tokens, tokens, scale=scale, window_size=(left, 0), enable_gqa=fewer)
    return out.unflatten(0, (rows, tokens)).transpose(1, 2)


def _bias(query: torch.Tensor, key: torch.Tensor, *, causal: bool, mask: torch.Tensor | None) -> torch.Tensor | None:
    """What is added to scores [..., S, T], where a kernel takes no flag for it: masks, and on CUDA all of float32."""
    if mask is None and (query.device.type == "cpu" or query.dtype in (torch.bfloat16, torch.float16)):
        return None
    rows, columns = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(rows, columns, dtype=torch.bool)
        mask = mask.tril() if causal else mask
    bias = query.new_zeros(*mask.shape[:-2], rows, columns + -columns % BIAS_ALIGNMENT)[..., :columns]
    return bias.masked_fill_(~mask.to(query.device), -torch.inf)


def _as_many_heads(query: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    return heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1)
