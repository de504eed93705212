"""The attention function that Hugging Face modules call, through the transformers registry.

Causal or not, on the local heads of whole sequences, in each document by itself where they are packed (``documents``);
a sliding window becomes a mask only where it is shorter than the sequence.  The model makes no masks, for it knows of
none that go with this name: with one it would look at the positions in every microbatch, and the host would wait for
the device each time.  Padding is a document of its own.
Attention sinks (gpt-oss) are a ring's, if need be of one rank (``ring``).
What training never asks for (masks, a KV cache) is refused, not ignored.

A layer whose sequence is cut by more than tp has a ``Context`` at its modules.  They hand over queries, keys and
values of this rank's tokens, rotary positions applied; what attends are whole sequences of some heads (``ulysses``).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from galvatron.core.errors import ConfigError
from galvatron.core.family import Family
from galvatron.internals import attend_by_bounds, attends_by_bounds, call_attention, called_attention

from ..processes.collectives import ALONE, AxisGroup
from .bias import own_heads, whole_bias, with_bias
from .documents import Documents, see_each_other, see_first
from .ring import ring_attention
from .softcap import capped_attention
from .ulysses import collect_heads, deal_heads, own_sinks

NAME, UNMASKED = "galvatron", "galvatron-unmasked"

IGNORED = (
    "position_ids",
    "output_router_logits",
    "use_cache",
    "past_key_values",
    "output_attentions",
    "output_hidden_states",
    "deterministic",
)
"""What modules pass to every attention function and training leaves at its default, or rotary tables have used."""


_CONTEXT = "galvatron_context"


@dataclass(frozen=True)
class Context:
    """The ranks that hold other tokens of this rank's sequences, beside tp's, which the layer gathers itself.

    ``tp``: those that have other heads.
    """

    ulysses: AxisGroup = ALONE
    ring: AxisGroup = ALONE
    tp: AxisGroup = ALONE


_WHOLE = Context()


def attend_across(layer: nn.Module, context: Context) -> None:
    """Let the attention modules of ``layer`` attend to what all ranks of ``context`` hold."""
    for module in layer.modules():
        if isinstance(getattr(module, "config", None), PretrainedConfig):
            setattr(module, _CONTEXT, context)
        if hasattr(module, "compute_bias"):
            module.compute_bias = whole_bias(module.compute_bias, context.ulysses.size)  # type: ignore[assignment,arg-type]


def use_attention(model: PreTrainedModel, family: Family) -> None:
    """Make every attention module of ``model`` call ``attention`` (registered once under ``NAME``, and without masks).

    Layers whose tokens see each other in another way too keep the type's own attention, and masks that the model makes.

    The modules get a config of their own: ``model.config`` is the user's, and other models may be made from it.
    """
    AttentionInterface.register(NAME, attention)
    AttentionInterface.register(UNMASKED, _unmasked_attention)
    called = UNMASKED if family.needless_masks else NAME
    own: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if module is not model and isinstance(config, PretrainedConfig):
            if id(config) not in own:
                own[id(config)] = copy.deepcopy(config)
                call_attention(own[id(config)], called if family.asks_for_attention else "eager")
                if getattr(config, "use_cache", False):
                    own[id(config)].use_cache = False  # which a repeated forward would fill twice
            module.config = own[id(config)]  # type: ignore[assignment]
    for stack in family.stacks if family.needless_masks else ():
        for module in model.get_submodule(stack.path).modules():
            module.is_causal = stack.causal  # type: ignore[assignment]  # which their masks said


def uses_attention(model: PreTrainedModel) -> bool:
    """Whether ``use_attention`` was called with it: then another has taken it apart, or had begun to."""
    configs = [getattr(module, "config", None) for module in model.modules() if module is not model]
    return any(
        isinstance(config, PretrainedConfig) and called_attention(config) in (NAME, UNMASKED) for config in configs
    )


def _unmasked_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any, **options: Any) -> Any:
    """``attention`` for types whose masks are needless."""
    return attention(module, query, key, value, None, **options)


def attention(
    module: nn.Module,
    query_BNSD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: Documents | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of N query heads over K key/value heads (K divides N); returns ([B, S, N, D], None).

    ``is_causal``: by default what the module says, and causal where it says nothing.

    ``documents``: of the whole sequences, however many ranks cut them; those of a side say nothing of a sequence that
    attends to itself, which is causal then.  ``s_aux`` [N]: a sink for every head.

    Raises:
        ConfigError: it is asked for anything but attention of whole sequences.
    """
    context: Context = getattr(module, _CONTEXT, _WHOLE)
    unknown = [name for name, value in options.items() if name not in IGNORED and value is not None]
    if attention_mask is not None or unknown:
        asked = ", ".join(["a mask"] * (attention_mask is not None) + unknown)
        raise ConfigError(f"a parallel model attends to whole sequences, asked for {asked}; leave it out")
    causal: bool = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal:
        _check_whole(query_BNSD.shape[2], key_BKSD.shape[2])
        documents = None if documents is not None and documents.of_side else documents
    local = query_BNSD.transpose(1, 2), key_BKSD.transpose(1, 2), value_BKSD.transpose(1, 2)
    query, key, value = (heads.transpose(1, 2) for heads in deal_heads(*local, context.ulysses))
    seq_len = query.shape[2] * context.ring.size
    window = sliding_window if sliding_window is not None and sliding_window < seq_len else None
    if context.ring.size > 1 or s_aux is not None:
        _check_ring(context.ring, dropout, softcap, position_bias)
        starts, sinks = None if documents is None else documents.starts, own_sinks(s_aux, context.ulysses)
        ring = partial(ring_attention, query, key, value, context.ring, scaling, window)
        out_BNSD = ring(causal=causal, starts=starts, sinks_N=sinks)
    else:
        bias = own_heads(position_bias, context.tp, context.ulysses)
        out_BNSD = _attend(query, key, value, scaling, window, documents, bias, softcap, dropout, causal=causal)
    return collect_heads(out_BNSD.transpose(1, 2), context.ulysses).contiguous(), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
    documents: Documents | None,
    bias: Tensor | None,
    softcap: float | None,
    dropout: float,
    *,
    causal: bool,
) -> Tensor:
    """By the fastest kernel that can, of whole sequences: [B, N, S, D]."""
    bounds, is_plain = None if documents is None else documents.bounds, bias is None and softcap is None
    if bounds is not None and causal and is_plain and attends_by_bounds(query.dtype, dropout):
        return attend_by_bounds(query, key, value, bounds, scale, window)
    mask = _mask(query.shape[2], window, documents, query.device, causal=causal)
    if bias is not None:
        mask = with_bias(bias.to(query.dtype), mask, causal=causal)
    if softcap is not None:
        if not causal:
            raise ConfigError(f"scores are capped where attention is causal, asked for {softcap} where it is not")
        return capped_attention(query, key, value, mask, softcap, scale, dropout)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _mask(
    seq_len: int, window: int | None, documents: Documents | None, device: torch.device, *, causal: bool
) -> Tensor | None:
    """[S, S] or [B, 1, S, S] bool: position i sees i - window + 1 ... i of its document, and as many after it if not
    ``causal``; None: all up to itself, or all."""
    if window is None and documents is None:
        return None
    if documents is not None and documents.of_side:
        return see_first(documents.starts)
    distance = torch.arange(seq_len, device=device)[:, None] - torch.arange(seq_len, device=device)[None, :]
    window = window or seq_len
    sees = (distance < window) & (distance >= 0 if causal else distance > -window)
    return sees if documents is None else sees & see_each_other(documents.starts, documents.starts)


def _check_ring(ring: AxisGroup, dropout: float, softcap: float | None, bias: Tensor | None) -> None:
    asks = "attention with sinks" if ring.size == 1 else f"a ring (cp={ring.size})"
    if dropout:
        raise ConfigError(f"{asks} draws no dropout of attention, asked for {dropout}; set it to 0")
    if softcap is not None:
        raise ConfigError(f"{asks} caps no scores, asked for {softcap}; set cp to 1, or leave out the cap or sinks")
    if bias is not None:
        raise ConfigError(f"{asks} adds no bias of positions; set cp to 1")


def _check_whole(num_queries: int, num_keys: int) -> None:
    if num_queries != num_keys:
        raise ConfigError(
            f"a parallel model sees whole sequences, got {num_queries} queries for {num_keys} keys; set "
            "use_cache=False, or generate with a model loaded from its checkpoint"
        )
