"""What a parallel model cannot do, though a Hugging Face model can: each named with what to use instead."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from galvatron.core.errors import UnsupportedError

_PLACED = "the plan says what runs where and in which precision; change the plan, or the model before parallelize"
_ONE_PROCESS = "save_pretrained(directory), then load it with AutoModelForCausalLM.from_pretrained in one process"
_ADAPTERS = "save_pretrained(directory) merges an adapter, and writes it alone with adapter_only=True"
INSTEAD_OF_COPYING = "each process holds a part of it; take state_dict(), or copy the Hugging Face model before"
INSTEAD_OF_FORWARD = "train_step gives loss and gradients, evaluate a loss; both take a loss_fn on the logits"
_REMEDIES = {
    **dict.fromkeys(("to", "cuda", "cpu", "half", "bfloat16", "float", "double", "type", "to_empty"), _PLACED),
    **dict.fromkeys(("resize_token_embeddings", "requires_grad_", "tie_weights", "compile"), _PLACED),
    **dict.fromkeys(("gradient_checkpointing_enable", "gradient_checkpointing_disable"), _PLACED),
    **dict.fromkeys(("generate", "push_to_hub"), _ONE_PROCESS),
    **dict.fromkeys(("merge_and_unload", "merge_adapter", "print_trainable_parameters"), _ADAPTERS),
    **dict.fromkeys(("forward", "backward"), INSTEAD_OF_FORWARD),
}


def refusal(name: str) -> Exception:
    """The error for an attribute ``name`` that a parallel model lacks."""
    if name in _REMEDIES:
        return UnsupportedError(f"a parallel model has no {name}: {_REMEDIES[name]}")
    if hasattr(PreTrainedModel, name) or hasattr(nn.Module, name):
        return UnsupportedError(
            f"a parallel model has no {name}: each process holds a part of it; take its whole weights by "
            "state_dict() or save_pretrained(directory), and this rank's modules from .stage"
        )
    return AttributeError(f"'ParallelModel' object has no attribute {name!r}")
