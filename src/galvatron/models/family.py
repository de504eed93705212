"""The family of a config: known by data, or found by recognition."""

from __future__ import annotations

from transformers import PretrainedConfig

from galvatron.core.errors import ConfigError
from galvatron.core.family import Family, known_families

from .recognise import recognise
from .twin import structure_key

_found: dict[str, Family] = {}


def family_of(config: PretrainedConfig) -> Family:
    """The family of ``config``, found by running a tiny twin unless one of its structure is known.

    Raises:
        ConfigError: it is no chain of layers that galvatron can drive, or no plain causal language model: quantised
            weights, attention that is not causal, cross attention.
    """
    for key, usual in (
        ("quantization_config", None),
        ("is_causal", True),
        ("add_cross_attention", False),
        ("output_router_logits", False),
    ):
        value = getattr(config, key, usual)
        if value != usual:
            raise ConfigError(
                f"{key} of this {config.model_type} config must be {usual}, got {_short(value)}; only plain causal "
                "language models can be trained"
            )
    key = structure_key(config)
    if key not in _found:
        known = known_families().get(config.model_type)
        _found[key] = known.family if known is not None and key in known.proved else recognise(config)
    return _found[key]


def _short(value: object) -> str:
    """A nested config by its method alone."""
    return str(value.get("quant_method", value)) if isinstance(value, dict) else str(value)
