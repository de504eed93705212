"""ModelSpec of a Hugging Face config or model: its units in order, their sizes, and what rides between them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

from pydantic import ValidationError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from galvatron.core.defects import sentence
from galvatron.core.errors import ConfigError
from galvatron.core.family import BEYOND_RINGS, DROPS, WINDOWS, Family, Stack, beside_experts
from galvatron.core.lora import Lora
from galvatron.core.model import Joint, LayerKind, ModelSpec, ParameterSpec, UnitSpec
from galvatron.core.numbers import MAX_TOKENS

from .chain import Link, chain_of, regions_in
from .cuts import embedding_parameters, first_names, head_parameters, layer_parameters, weight_sizes
from .family import family_of
from .freeze import freeze_parameters
from .heads import config_in, head_width, heads_in
from .inputs import words_of
from .load import meta_model
from .lora import attach_lora
from .shapes import entering_tokens, fixed_tokens, pooled_width, windowed_path
from .sizes import EXPERT_KEYS, TAKEN_KEYS
from .tasks import config_of
from .towers import described_tower

POSITIONS = ("max_position_embeddings", "max_target_positions")
"""Keys of configs for how long a text can be."""


def build_spec(
    config: PretrainedConfig, name: str | None = None, freeze: Collection[str] = (), lora: Lora | None = None
) -> ModelSpec:
    """Describe the model of ``config`` without allocating it; ``name`` defaults to its family and size.

    ``freeze``: parameters that are not trained, by name or pattern (see ``models.freeze``); ``lora``: adapters to add.
    """
    return spec_of(model_to_train(config, freeze, lora), name)


def model_to_train(
    config: PretrainedConfig, freeze: Collection[str] = (), lora: Lora | None = None, origin: str = ""
) -> PreTrainedModel:
    """The ``meta_model`` of ``config`` with adapters, if ``lora`` describes some, and with what is frozen.

    ``origin``: what an exported adapter will name as its base model.
    """
    _check_padding(config, family_of(config))
    model = meta_model(config)
    if lora is not None:
        attach_lora(model, lora, origin)
    freeze_parameters(model, freeze)
    return model


def _check_padding(config: PretrainedConfig, family: Family) -> None:
    if family.task == "text_classification" and family.stacks[-1].causal and config.pad_token_id is None:
        raise ConfigError(
            f"a {config.model_type} that classifies texts finds their last token by pad_token_id, which its config "
            "lacks; give it one"
        )


def spec_of(model: PreTrainedModel, name: str | None = None, family: Family | None = None) -> ModelSpec:
    """Describe a model that is what its config says; what does not require a gradient is frozen.

    Layers that follow each other and train alike are of one kind, named by their indices where there are several.

    Raises:
        ConfigError: its family has no record, or its sizes contradict each other.
    """
    try:
        return _described(model, name, family or family_of(config_of(model)))
    except ValidationError as failure:
        raise ConfigError(
            f"the {model.config.model_type} config: {sentence(ModelSpec, failure)}; mend its config.json"
        ) from None


def _described(model: PreTrainedModel, name: str | None, family: Family) -> ModelSpec:
    config = model.config
    tokens = fixed_tokens(config, family)
    layers = [(model.get_submodule(link.path), link) for link in chain_of(model, family)]
    carried = _carried(model, family, tokens)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return ModelSpec(
        name=name or f"{config.model_type}-{millions:.3g}M",
        family=config.model_type,
        layers=tuple(
            _kind(name, count, layer, link, parameters, config, family, tokens, carried[link.stack.path])
            for name, count, layer, link, parameters in _kinds(layers, config)
        ),
        task=family.task,
        ends=family.ends,
        stacks=len(family.stacks),
        joints=tuple(_joints(model, family)),
        vocab_size=_outputs(config, family),
        max_seq_len=_most_tokens(model, family),
        tied_embeddings=_is_tied(model, family),
        embedding=UnitSpec(parameters=tuple(embedding_parameters(model, family))),
        head=UnitSpec(parameters=tuple(head_parameters(model, family))),
        tower=described_tower(model, family),
    )


def _joints(model: PreTrainedModel, family: Family) -> Iterator[Joint]:
    """Of every stack but the first; parameters in the embedding's order."""
    names, layer = first_names(model), 0
    every = [p.name for p in embedding_parameters(model, family)]
    joined = {path for stack in family.stacks for path in stack.joined}
    first = {p for path in family.before if path not in joined for p in model.get_submodule(path).parameters()}
    table = None if family.embedding is None else model.get_submodule(family.embedding).get_parameter("weight")
    for before, stack in itertools.pairwise(family.stacks):
        layer += len(model.get_submodule(before.path))  # type: ignore[arg-type]
        own = dict.fromkeys(p for path in stack.joined for p in model.get_submodule(path).parameters())
        alone = {names[p] for p in own if p not in first}
        parameters = tuple(name for name in every if name in alone)
        yield Joint(layer=layer, parameters=parameters, table=table in own and table in first)


def _carried(model: PreTrainedModel, family: Family, tokens: dict[str, int]) -> dict[str, int]:
    """By path, what rides along with samples through a stack and has no size of theirs: elements.

    What an earlier tower came to; states of another stack that always have as many tokens.
    """
    found, width = {family.stacks[0].path: 0}, 0
    for before, stack in itertools.pairwise(family.stacks):
        if before.pooled is not None:
            width += pooled_width(model, before.pooled, family)
        fixed = tokens.get(before.path, 0) if stack.side is not None else 0
        first = model.get_submodule(f"{before.path}.0")
        found[stack.path] = width + fixed * (_width(first, before) if fixed else 0)
    return found


def _width(layer: nn.Module, stack: Stack) -> int:
    """Of hidden states: what a region gives, or what the first linear or matrix takes."""
    rows = (weight_sizes(layer.get_submodule(region.row))[1] for region in regions_in(layer, stack))
    linears = (weight_sizes(m)[0] for m in layer.modules() if isinstance(m, (nn.Linear, Conv1D)))
    matrices = (p.shape[-1] for p in layer.parameters() if p.dim() == 2)
    return next(itertools.chain(rows, linears, matrices))


def _is_beyond_rings(config: PretrainedConfig, stack: Stack) -> bool:
    """Whether attention is dropped or capped, or a window looks both ways."""
    windows = not stack.causal and any(getattr(config, name, None) for name in WINDOWS)
    return windows or any(getattr(config, name, None) for name in BEYOND_RINGS)


def _outputs(config: PretrainedConfig, family: Family) -> int:
    """Words, or classes."""
    count: int = words_of(config) if family.head is not None else config.num_labels or 1
    return count


def _most_tokens(model: PreTrainedModel, family: Family) -> int:
    """The longest sequence; of images, which are all of one size, the length of all.

    RoBERTa's positions begin after that of padding.
    """
    if family.task == "image_classification":
        return entering_tokens(model, family)
    text = model.config.get_text_config()
    most: int = next((n for key in POSITIONS if (n := getattr(text, key, None))), MAX_TOKENS)
    before = (module for name in family.before for module in model.get_submodule(name).modules())
    tables = (m for m in before if isinstance(m, nn.Embedding) and m.num_embeddings == most)
    return most - max((m.padding_idx + 1 for m in tables if m.padding_idx is not None), default=0)


def _is_tied(model: PreTrainedModel, family: Family) -> bool:
    if family.embedding is None or family.head is None:
        return False
    return model.get_submodule(family.embedding).weight is model.get_submodule(family.head).weight


def _kind(
    name: str,
    count: int,
    layer: nn.Module,
    link: Link,
    parameters: tuple[ParameterSpec, ...],
    config: PretrainedConfig,
    family: Family,
    tokens: dict[str, int],
    carried: int,
) -> LayerKind:
    stack = link.stack
    own, heads, hidden = config_in(layer, config), heads_in(layer, config), _width(layer, stack)
    rides_along = stack.side is not None and not carried
    return LayerKind(
        name=name,
        count=count,
        hidden_size=hidden,
        fixed_tokens=tokens.get(stack.path, 0),
        ffn_size=_expert_width(parameters) or _ffn_size(layer, stack, own, hidden),
        num_heads=heads["heads"],
        num_kv_heads=1 if _has_one_kv_head(layer, stack) else heads["kv_heads"],
        head_dim=head_width(own, heads["heads"], hidden),
        drops_attention=_is_beyond_rings(own, stack) or len(family.stacks) > 1,
        side_inputs=int(rides_along),
        carried=carried,
        regions=2 + int(stack.side is not None),
        causal=stack.causal,
        attention_span=tokens.get(windowed_path(stack)),
        windowed=stack.windowed,
        asks_for_attention=family.asks_for_attention,
        cuttable=bool(stack.regions),
        idle=link.is_idle,
        needs_output=stack.needs_output or any(getattr(own, name, None) for name in DROPS),
        parameters=parameters,
        beside_experts=beside_experts(stack, parameters),
        **(_expert_counts(own) if any(p.experts for p in parameters) else {}),
    )


def _kinds(
    layers: list[tuple[nn.Module, Link]], config: PretrainedConfig
) -> Iterator[tuple[str, int, nn.Module, Link, tuple[ParameterSpec, ...]]]:
    """(name, count, first, its link, parameters) of every run of layers of a stack that run and train alike."""
    start = 0
    described = (
        (link.stack.path, link.is_idle, _frozen(parameters) if link.is_idle else parameters)
        for layer, link in layers
        for parameters in [layer_parameters(layer, link.stack, heads_in(layer, config))]
    )
    for (*_, parameters), members in itertools.groupby(described):
        count = len(list(members))
        name = "layer" if count == len(layers) else f"layers {start}-{start + count - 1}"
        yield name, count, *layers[start], parameters
        start += count


def _frozen(parameters: tuple[ParameterSpec, ...]) -> tuple[ParameterSpec, ...]:
    return tuple(parameter.model_copy(update={"trainable": False}) for parameter in parameters)


def _has_one_kv_head(layer: nn.Module, stack: Stack) -> bool:
    """Whether its attention has a single one by a flag, beside which a config may count others."""
    return any("kv_head" in blocks for region in regions_in(layer, stack) for blocks in region.columns.values())


def _ffn_size(layer: nn.Module, stack: Stack, config: PretrainedConfig, hidden: int) -> int:
    """The width of the MLP; of layers of experts that are not cut, that of one; ``hidden`` where nothing says it."""
    widths = (weight_sizes(layer.get_submodule(r.row))[0] for r in regions_in(layer, stack) if r.row_blocks == "ffn")
    named = (getattr(config, name, None) for name in ("moe_intermediate_size", "intermediate_size"))
    return next((width for width in itertools.chain(widths, named) if width), hidden)


def _expert_width(parameters: tuple[ParameterSpec, ...]) -> int:
    """The width of one expert, if there are some and it is known how they are cut; 0 if not."""
    return min((p.cut.segments[0] for p in parameters if p.experts and p.cut is not None), default=0)


def _expert_counts(config: PretrainedConfig) -> dict[str, int]:
    count = next((n for key in EXPERT_KEYS if (n := getattr(config, key, None))), 0)
    taken = next((n for key in TAKEN_KEYS if (n := getattr(config, key, None))), 1)
    return {"num_experts": count, "experts_per_token": taken} if count else {}
