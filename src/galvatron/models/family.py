"""The Family record: the names by which a family's modules are known, and what each linear is cut by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import PretrainedConfig

from galvatron.core.errors import ConfigError

# What the blocks of a cut are: see core.model.Cut.
Blocks = Literal["heads", "kv_heads", "ffn"]


@dataclass(frozen=True, kw_only=True)
class Region:
    """A submodule of a layer that needs the gathered sequence: it enters whole and leaves cut.

    Attributes:
        module: its name in the layer.
        columns: linears cut along their output, with what they are cut by.
        rows: linears cut along their input, whose output is reduce-scattered.
        segments: how many equal parts a fused column linear holds, by name.
        local_sizes: integer attributes of the module that count cut elements and are divided by tp.
    """

    module: str
    columns: dict[str, Blocks]
    rows: dict[str, Blocks]
    segments: dict[str, int] = field(default_factory=dict)
    local_sizes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a family keeps its units; names are relative to the decoder, regions to a layer."""

    name: str
    model_types: tuple[str, ...]
    decoder: str
    embedding: str
    layers: str
    norm: str
    regions: tuple[Region, ...]
    head: str = "lm_head"
    position_embedding: str | None = None


def family_of(config: PretrainedConfig) -> Family:
    """The record of ``config``'s family; raises ConfigError for a model that no record describes.

    That is a family without a record, and what makes another model of one: quantised weights, attention that is
    not causal, cross attention.
    """
    from .gpt2 import GPT2
    from .llama import LLAMA_LIKE

    families = {model_type: family for family in (GPT2, LLAMA_LIKE) for model_type in family.model_types}
    if config.model_type not in families:
        raise ConfigError(
            f"model_type={config.model_type!r} is not supported; choose one of {', '.join(sorted(families))} "
            "or add a record (docs/add-a-model.md)"
        )
    for key, usual in (("quantization_config", None), ("is_causal", True), ("add_cross_attention", False)):
        value = getattr(config, key, usual)
        if value != usual:
            raise ConfigError(
                f"{key} of this {config.model_type} config must be {usual}, got {_short(value)}; only plain causal "
                "language models can be trained"
            )
    return families[config.model_type]


def _short(value: object) -> str:
    """A nested config by its method alone."""
    return str(value.get("quant_method", value)) if isinstance(value, dict) else str(value)
