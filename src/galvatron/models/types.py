"""A type of model by its name alone: its own config, complete.

Takes the name of a type; gives a config.  Some types leave open what their modules cannot do without.
"""

from __future__ import annotations

import copy

import torch
from transformers import AutoConfig, PretrainedConfig

from .twin import run_twin, twin_config, twin_inputs, twin_model

OPEN = {
    "num_key_value_heads": "num_attention_heads",
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "vocab_size": 97,
    "pad_token_id": 1,
}
"""What else a config may leave open: a size, or what it is equal to."""


def usual_config(model_type: str) -> PretrainedConfig:
    """The config of a type that is told no sizes; with those that it leaves open, where no twin runs without."""
    config = AutoConfig.for_model(model_type)
    if _runs(config):
        return config
    filled = copy.deepcopy(config)
    for part in (filled, *(getattr(filled, name, None) for name in filled.sub_configs)):
        if isinstance(part, PretrainedConfig):
            _fill(part)
    return filled if _runs(filled) else config


def _fill(config: PretrainedConfig) -> None:
    given = config.to_dict()
    if given.get("head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if given.get("layer_types", ()) is None:
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    for name, size in OPEN.items():
        if given.get(name, 0) is None:
            setattr(config, name, getattr(config, size) if isinstance(size, str) else size)


def _runs(config: PretrainedConfig) -> bool:
    """Whether its twin does."""
    try:
        twin = twin_config(config)
        with torch.no_grad():
            run_twin(twin_model(twin), twin_inputs(twin))
    except Exception:  # of any kind: a foreign model is built and run
        return False
    return True
