"""Whether tokens see each other through nothing but the attention that a config names, which can then be replaced.

Takes a config and its stacks; runs a twin with an attention that shows each token itself alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from galvatron.core.family import Stack
from galvatron.internals import call_attention

from .trace import Trace, traced
from .twin import twin_config, twin_inputs, twin_model

WATCHED = "galvatron-watched"


def asks_for_attention(config: PretrainedConfig, stacks: tuple[Stack, ...]) -> tuple[bool, bool]:
    """Whether tokens see each other only through the attention that the config names, and whether it is given masks.

    With one that shows each token its own value alone, what leaves a stack depends on nothing else of what enters it.
    Masks that hide what causality alone does not are a way of the type's own.
    """
    masks: list[bool] = []
    model = twin_model(twin_config(config))
    causal = {id(module): stack.causal for stack in stacks for module in model.get_submodule(stack.path).modules()}

    def watch(
        module: nn.Module,
        query_BNSD: Tensor,
        key_BKSD: Tensor,
        value_BKSD: Tensor,
        attention_mask: Any = None,
        **_: Any,
    ) -> Any:
        masks.append(attention_mask is not None)
        if attention_mask is not None and not _is_needless(attention_mask, causal.get(id(module), False)):
            raise ValueError("a mask hides more")
        own = value_BKSD.repeat_interleave(query_BNSD.shape[1] // value_BKSD.shape[1], dim=1)
        if own.shape[2] != query_BNSD.shape[2]:  # of another stack's states
            own = own.mean(dim=2, keepdim=True).expand(-1, -1, query_BNSD.shape[2], -1)
        return own.transpose(1, 2).contiguous(), None

    AttentionInterface.register(WATCHED, watch)
    for own in {
        id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PretrainedConfig)
    }.values():
        call_attention(own, WATCHED)
    try:
        trace = traced(model, twin_inputs(model.config))
    except Exception:  # an attention of the type's own that knows no other name, or masks that matter
        return False, False
    asks = bool(masks) and not any(_mixes(trace, model.get_submodule(stack.path)) for stack in stacks)
    return asks, asks and any(masks)


def _is_needless(mask: object, causal: bool) -> bool:
    """Whether a mask [..., queries, keys], of what is seen or added to scores, says what ``causal`` says already."""
    if not isinstance(mask, Tensor):
        return False
    seen = mask if mask.dtype == torch.bool else mask == 0
    wanted = torch.ones(seen.shape[-2:], dtype=torch.bool)
    return bool((seen == (wanted.tril() if causal else wanted)).all())


def _mixes(trace: Trace, stack: nn.Module) -> bool:
    """Whether a token in the middle depends on others."""
    layers = list(stack.children())
    entering, leaving = trace.of(layers[0]).argument, trace.of(layers[-1]).output
    middle = leaving.shape[1] // 2
    (gradient,) = torch.autograd.grad(leaving[:, middle].square().sum(), entering, retain_graph=True)
    return bool(gradient[:, :middle].any()) or bool(gradient[:, middle + 1 :].any())
