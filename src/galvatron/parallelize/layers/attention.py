"""The attention function that Hugging Face modules call, through the transformers registry.

Causal, on the local heads of whole sequences; a sliding window becomes a mask only where it is shorter
than the sequence.  The model makes no masks, for it knows of none that go with this name: with one it would look at the
positions in every microbatch, and the host would wait for the device each time.  Documents are packed, not padded.
What training never asks for (padding, a KV cache, soft caps, attention sinks) is refused, not ignored.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from galvatron.core.errors import ConfigError
from galvatron.internals import call_attention, called_attention

NAME = "galvatron"

IGNORED = ("position_ids", "use_cache", "past_key_values", "output_attentions", "output_hidden_states")
"""What modules pass to every attention function and training leaves at its default, or rotary tables have used."""


def use_attention(model: PreTrainedModel) -> None:
    """Make every attention module of ``model`` call ``attention`` (registered once under ``NAME``).

    The modules get a config of their own: ``model.config`` is the user's, and other models may be made from it.
    """
    AttentionInterface.register(NAME, attention)
    model.register_forward_pre_hook(_refuse_padding, with_kwargs=True)  # a stage calls the modules within
    own: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if module is not model and isinstance(config, PretrainedConfig):
            if id(config) not in own:
                own[id(config)] = copy.deepcopy(config)
                call_attention(own[id(config)], NAME)
            module.config = own[id(config)]  # type: ignore[assignment]


def uses_attention(model: PreTrainedModel) -> bool:
    """Whether ``use_attention`` was called with it: then another has taken it apart, or had begun to."""
    configs = [getattr(module, "config", None) for module in model.modules() if module is not model]
    return any(isinstance(config, PretrainedConfig) and called_attention(config) == NAME for config in configs)


def attention(
    module: nn.Module,
    query_BNSD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of N query heads over K key/value heads (K divides N); returns ([B, S, N, D], None).

    Raises:
        ConfigError: it is asked for anything but causal attention of whole sequences.
    """
    seq_len = query_BNSD.shape[2]
    unknown = [name for name, value in options.items() if name not in IGNORED and value is not None]
    if attention_mask is not None or unknown or not getattr(module, "is_causal", True):
        asked = ", ".join(["a mask"] * (attention_mask is not None) + unknown) or "attention that is not causal"
        raise ConfigError(f"a parallel model attends causally to whole sequences, asked for {asked}; leave it out")
    _check_whole(seq_len, key_BKSD.shape[2])
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


def _refuse_padding(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("attention_mask") is not None or any(value is not None for value in args[1:2]):
        raise ConfigError("a parallel model takes sequences without padding, got an attention_mask; leave it out")


def _check_whole(num_queries: int, num_keys: int) -> None:
    if num_queries != num_keys:
        raise ConfigError(
            f"a parallel model sees whole sequences, got {num_queries} queries for {num_keys} keys; set "
            "use_cache=False, or generate with a model loaded from its checkpoint"
        )
