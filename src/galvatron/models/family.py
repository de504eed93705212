"""The family of a config: known by data, or found by recognition."""

from __future__ import annotations

from transformers import PretrainedConfig

from galvatron.core.errors import ConfigError
from galvatron.core.family import Family
from galvatron.core.known import known_family

from .recognise import recognise
from .tasks import task_of
from .twin import structure_key

_found: dict[str, Family] = {}
UNUSUAL_DECODERS: dict[str, object] = {
    "quantization_config": None,
    "is_causal": True,
    "add_cross_attention": False,
}
"""What must be so of a causal language model's config."""


def family_of(config: PretrainedConfig) -> Family:
    """The family of ``config``, found by running a tiny twin unless one of its structure is known.

    Raises:
        ConfigError: it is no chain of layers that galvatron can drive, or no plain model: quantised weights, a causal
            language model whose attention is not causal or crosses to another's states.
    """
    usually = UNUSUAL_DECODERS if task_of(config) == "causal_lm" else {"quantization_config": None}
    for key, usual in usually.items():
        value = getattr(config, key, usual)
        if value != usual:
            raise ConfigError(
                f"{key} of this {config.model_type} config must be {usual}, got {_short(value)}; only plain models "
                "can be trained"
            )
    key = structure_key(config)
    if key not in _found:
        known = known_family(config.model_type, task_of(config))
        is_shipped = known is not None and key in known.proved
        _found[key] = known.family if known is not None and is_shipped else recognise(config)
    family = _found[key]
    if getattr(config, "output_router_logits", False) and all(stack.experts is None for stack in family.stacks):
        raise ConfigError(
            f"output_router_logits of this {config.model_type} config must be False, got True; where its routers are "
            "is not known"
        )
    return family


def _short(value: object) -> str:
    """A nested config by its method alone."""
    return str(value.get("quant_method", value)) if isinstance(value, dict) else str(value)
