"""ModelSpec of a Hugging Face config: sizes, and every parameter with its tensor-parallel cut."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

from pydantic import ValidationError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from galvatron.core.defects import sentence
from galvatron.core.errors import ConfigError
from galvatron.core.model import Cut, LayerKind, ModelSpec, ParameterSpec, UnitSpec

from .family import Blocks, Family, family_of
from .freeze import freeze_parameters
from .load import meta_model

ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""What configs call the rate of dropout on attention's weights."""


def build_spec(config: PretrainedConfig, name: str | None = None, freeze: Collection[str] = ()) -> ModelSpec:
    """Describe the model of ``config`` without allocating it; ``name`` defaults to its family and size.

    ``freeze``: parameters that are not trained, by name or pattern (see ``models.freeze``).
    """
    family_of(config)
    model = meta_model(config)
    freeze_parameters(model, freeze)
    return spec_of(model, name)


def spec_of(model: PreTrainedModel, name: str | None = None) -> ModelSpec:
    """Describe a model that is what its config says; what does not require a gradient is frozen.

    Layers that follow each other and train alike are of one kind, named by their indices where there are several.

    Raises:
        ConfigError: its family has no record, or its sizes contradict each other.
    """
    try:
        return _described(model, name)
    except ValidationError as failure:
        raise ConfigError(
            f"the {model.config.model_type} config: {sentence(ModelSpec, failure)}; mend its config.json"
        ) from None


def _described(model: PreTrainedModel, name: str | None) -> ModelSpec:
    config = model.config
    family = family_of(config)
    decoder = model.get_submodule(family.decoder)
    counts = block_counts(config, model, family)
    layers: nn.ModuleList = decoder.get_submodule(family.layers)  # type: ignore[assignment]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return ModelSpec(
        name=name or f"{config.model_type}-{millions:.3g}M",
        family=config.model_type,
        layers=tuple(
            LayerKind(
                name=kind,
                count=count,
                hidden_size=config.hidden_size,
                ffn_size=counts["ffn"],
                num_heads=counts["heads"],
                num_kv_heads=counts["kv_heads"],
                head_dim=getattr(config, "head_dim", None) or config.hidden_size // counts["heads"],
                drops_attention=any(getattr(config, name, 0.0) for name in ATTENTION_DROPOUT),
                parameters=parameters,
            )
            for kind, count, parameters in _kinds(layers, family, counts)
        ),
        vocab_size=config.vocab_size,
        max_seq_len=config.max_position_embeddings,
        tied_embeddings=bool(config.tie_word_embeddings),
        embedding=UnitSpec(parameters=tuple(_embedding_parameters(model, family))),
        head=UnitSpec(parameters=tuple(_head_parameters(model, family))),
    )


def _kinds(
    layers: nn.ModuleList, family: Family, counts: dict[Blocks, int]
) -> Iterator[tuple[str, int, tuple[ParameterSpec, ...]]]:
    """(name, count, parameters) of every run of layers that train alike."""
    start = 0
    for parameters, members in itertools.groupby(layer_parameters(layer, family, counts) for layer in layers):
        count = len(list(members))
        yield "layer" if count == len(layers) else f"layers {start}-{start + count - 1}", count, parameters
        start += count


def block_counts(config: PretrainedConfig, model: PreTrainedModel, family: Family) -> dict[Blocks, int]:
    """How many blocks of each kind a layer has."""
    layer = model.get_submodule(f"{family.decoder}.{family.layers}.0")
    mlp = family.regions[-1]
    down = layer.get_submodule(f"{mlp.module}.{next(iter(mlp.rows))}")
    heads: int = config.num_attention_heads
    return {
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "ffn": weight_sizes(down)[0],
    }


def weight_sizes(linear: nn.Module) -> tuple[int, int]:
    """(input size, output size) of an nn.Linear or of the transposed Conv1D that GPT-2 uses."""
    rows, columns = linear.weight.shape  # type: ignore[misc]
    return (int(rows), int(columns)) if isinstance(linear, Conv1D) else (int(columns), int(rows))


def layer_parameters(layer: nn.Module, family: Family, counts: dict[Blocks, int]) -> tuple[ParameterSpec, ...]:
    """Every parameter of an uncut ``layer`` with its cut, in the module's own order."""
    cuts = dict(_layer_cuts(layer, family, counts))
    return tuple(
        ParameterSpec(name=name, shape=tuple(p.shape), cut=cuts.get(name), trainable=p.requires_grad)
        for name, p in layer.named_parameters()
    )


def _layer_cuts(layer: nn.Module, family: Family, counts: dict[Blocks, int]) -> Iterator[tuple[str, Cut]]:
    for region in family.regions:
        for linear, blocks in region.columns.items():
            name = f"{region.module}.{linear}"
            output_dim = 1 if isinstance(layer.get_submodule(name), Conv1D) else 0
            segments = (counts[blocks],) * region.segments.get(linear, 1)
            uneven = "whole" if blocks == "kv_heads" else "refuse"
            cut = Cut(dim=output_dim, segments=segments, uneven=uneven)
            yield f"{name}.weight", cut
            yield f"{name}.bias", cut.model_copy(update={"dim": 0})
        for linear, blocks in region.rows.items():
            name = f"{region.module}.{linear}"
            input_dim = 0 if isinstance(layer.get_submodule(name), Conv1D) else 1
            yield f"{name}.weight", Cut(dim=input_dim, segments=(counts[blocks],))


def _embedding_parameters(model: PreTrainedModel, family: Family) -> Iterator[ParameterSpec]:
    embedding = model.get_submodule(f"{family.decoder}.{family.embedding}")
    yield _vocabulary_cut(f"{family.decoder}.{family.embedding}.weight", embedding)
    if family.position_embedding:
        name = f"{family.decoder}.{family.position_embedding}.weight"
        positions = model.get_parameter(name)
        yield ParameterSpec(name=name, shape=tuple(positions.shape), trainable=positions.requires_grad)


def _head_parameters(model: PreTrainedModel, family: Family) -> Iterator[ParameterSpec]:
    norm = f"{family.decoder}.{family.norm}"
    for name, parameter in model.get_submodule(norm).named_parameters():
        yield ParameterSpec(name=f"{norm}.{name}", shape=tuple(parameter.shape), trainable=parameter.requires_grad)
    yield _vocabulary_cut(f"{family.head}.weight", model.get_submodule(family.head))


def _vocabulary_cut(name: str, module: nn.Module) -> ParameterSpec:
    weight = module.get_parameter("weight")
    cut = Cut(dim=0, segments=(weight.shape[0],), uneven="ceil")
    return ParameterSpec(name=name, shape=tuple(weight.shape), cut=cut, trainable=weight.requires_grad)
