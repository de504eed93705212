"""A family as data: every size of its parameters as a formula of its config's keys.

Takes a type's config; builds tiny models in two sizes, with each flag of the config set and unset, and finds formulas
that hold for all.  What is found is checked against the models themselves, so that a guess is never kept.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig

from galvatron.core.errors import ConfigError
from galvatron.core.family import BEYOND_RINGS, WINDOWS, Family, KnownFamily, Shape
from galvatron.core.formulas import num_patches, value
from galvatron.core.model import ModelSpec, ParameterSpec
from galvatron.core.numbers import MAX_TOKENS
from galvatron.core.tasks import CLASSIFICATION

from .family import family_of
from .load import meta_model
from .sizes import KV_KEYS
from .spec import spec_of
from .tasks import task_of
from .twin import twin_config

NAMES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
MORE = (
    "max_position_embeddings",
    "ffn_dim",
    "n_inner",
    "hidden_dim",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "embedding_size",
    "type_vocab_size",
    "num_channels",
    "patch_size",
    "mlp_ratio",
)
LEFT_OUT = (
    "max_position_embeddings",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "embedding_size",
    "type_vocab_size",
    "num_channels",
    "patch_size",
    "mlp_ratio",
    "pad_token_id",
    "image_size",
)
"""Sizes that files leave out where they are the type's own."""
PER_TOKEN = "num_experts_per_tok"
HEAD_DIM = "hidden_size/num_attention_heads"
NOT_STRUCTURAL = (
    "use_cache",
    "output_attentions",
    "output_router_logits",
    "output_hidden_states",
    "return_dict",
    "is_encoder_decoder",
    "tie_word_embeddings",
)
MAX_FACTOR, MAX_OFFSET = 8, 2


def describe(config: PretrainedConfig, proved: Mapping[str, str]) -> KnownFamily:
    """The family of a type's default ``config``, which names its architecture, its shapes, and what was ``proved``.

    Raises:
        ConfigError: it is no chain of layers, or some size follows from no formula.
    """
    config = _with_head_dim(config)
    family = family_of(config)
    twins = _two_sizes(config)
    sizes = [_sizes(twin) for twin in twins]
    flags, fixed = _flags(config, family)
    units = [_conditional(twins, family, flags, sizes, unit) for unit in ("embedding", "layer", "head")]
    specs = [spec_of(meta_model(twin), "x", family) for twin in twins]
    counted = _layer_sizes(specs, sizes, config)
    used = _used(units, counted)
    return KnownFamily(
        family=family,
        transformers=transformers.__version__,
        proved=dict(proved),
        names={
            name: key
            for name, key in ((n, _key(config, n)) for n in (*NAMES, *MORE, "num_hidden_layers"))
            if name != key and key
        },
        defaults=_defaults(config, family, used, flags),
        fixed=fixed,
        sizes=counted,
        embedding=units[0],
        layer=units[1],
        head=units[2],
    )


def _with_head_dim(config: PretrainedConfig) -> PretrainedConfig:
    """With a width of heads of its own, if the modules read one that the type's config leaves open."""
    if getattr(config, "head_dim", None) is not None:
        return config
    wide = twin_config(config)
    shapes = [p.shape for p in meta_model(wide).parameters()]
    wide.head_dim = 2 * wide.hidden_size // wide.num_attention_heads
    if [p.shape for p in meta_model(wide).parameters()] != shapes:
        config.head_dim = config.hidden_size // config.num_attention_heads
    return config


def _key(config: PretrainedConfig, name: str) -> str | None:
    """What ``config``'s files call a size; None if they have none."""
    key = config.attribute_map.get(name, name)
    if name == "num_key_value_heads" and key not in config.to_dict():
        key = next((k for k in KV_KEYS if k in config.to_dict()), key)
    return key if key in config.to_dict() else None


def _two_sizes(config: PretrainedConfig) -> tuple[PretrainedConfig, PretrainedConfig]:
    """Twins in which no two sizes are equal that need not be."""
    twins = twin_config(config), twin_config(config)
    explicit = getattr(config, "head_dim", None) is not None and "head_dim" in config.to_dict()
    for twin, heads, kv_heads, head_dim, ffn, hidden in zip(
        twins, (4, 6), (2, 3), (16, 20), (56, 88), (72, 140) if explicit else (64, 120), strict=True
    ):
        values = {
            "num_attention_heads": heads,
            "head_dim": head_dim,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "ffn_dim": ffn,
            "n_inner": ffn,
            "vocab_size": 97 + heads,
            "max_position_embeddings": 60 + heads,
            "word_embed_proj_dim": hidden,
            "moe_intermediate_size": ffn - 4,
            "num_experts": heads + 3,
            "num_local_experts": heads + 3,
            "hidden_dim": ffn,
            "embedding_size": 20 + heads,
            "type_vocab_size": 1 + heads // 2,
            "num_channels": heads - 3,
            "patch_size": heads // 2,
            "image_size": (heads // 2) * heads,
            "mlp_ratio": heads - 1,
            "num_labels": heads + 1,
            **dict.fromkeys(KV_KEYS, kv_heads),
        }
        for name, size in values.items():
            key = _key(config, name)
            if name == "num_labels" and task_of(config) in CLASSIFICATION:
                twin.num_labels = size
            elif key and (name == "n_inner" or isinstance(getattr(twin, key, None), int)):
                setattr(twin, key, size)
    return twins


def _sizes(twin: PretrainedConfig) -> dict[str, int]:
    found = {name: getattr(twin, key) for name in (*NAMES, *MORE) if (key := _key(twin, name))}
    sizes = {name: size for name, size in found.items() if isinstance(size, int)}
    if _key(twin, "image_size"):
        sizes["num_patches"] = num_patches(twin.image_size, twin.patch_size)
    padding: object = getattr(twin, "pad_token_id", None)
    if "max_position_embeddings" in sizes and isinstance(padding, int):
        sizes["num_positions"] = sizes["max_position_embeddings"] - padding - 1
    if task_of(twin) in CLASSIFICATION:
        sizes["num_labels"] = twin.num_labels or 1
    sizes.setdefault("num_key_value_heads", sizes["num_attention_heads"])
    sizes.setdefault("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    return sizes


def _formula(values: tuple[int, ...], sizes: list[dict[str, int]]) -> str:
    """The shortest formula that gives ``values`` at the two sizes."""
    for formula in _candidates(list(sizes[0])):
        if all(value(formula, size.__getitem__) == wanted for wanted, size in zip(values, sizes, strict=True)):
            return formula
    if values[0] == values[1]:
        return str(values[0])
    raise ConfigError(f"sizes of {values[0]} and {values[1]} follow from no key of the config; keep it out of the data")


def _candidates(names: list[str]) -> Iterator[str]:
    yield from names
    yield from (f"{factor}*{name}" for factor in range(2, MAX_FACTOR + 1) for name in names)
    yield from (f"{name}+{offset}" for offset in range(1, MAX_OFFSET + 1) for name in names)
    yield from (f"{a}*{b}" for a, b in itertools.combinations(names, 2))
    yield from (f"3*{a}*{b}" for a, b in itertools.combinations(names, 2))
    yield "num_attention_heads*head_dim+2*num_key_value_heads*head_dim"


def _flags(config: PretrainedConfig, family: Family) -> tuple[dict[str, bool], dict[str, bool | int | list[int]]]:
    """Flags that add or remove parameters, at their defaults; and values that change more, which stay as they are."""
    adding: dict[str, bool] = {}
    fixed: dict[str, bool | int | list[int]] = {}
    twin = twin_config(config)
    before = _by_name(twin, family)
    for name, usual in twin.to_dict().items():
        if name in NOT_STRUCTURAL and not (family.ends == "whole" and name == "tie_word_embeddings"):
            continue
        if not (isinstance(usual, bool) or usual == [] or usual == 1):
            continue
        setattr(twin, name, not usual if isinstance(usual, bool) else [0] if usual == [] else 2)
        try:
            after = _by_name(twin, family)
            own = family_of(twin)
            same_family = own.model_copy(update={"stacks": family.stacks}) == family
            same_family &= _by_name(twin, own) == after  # other regions may cut alike
            if after != before:
                shared = after.keys() & before.keys()
                same = same_family and isinstance(usual, bool) and all(after[key] == before[key] for key in shared)
                (adding if same else fixed)[name] = usual
            elif not same_family:
                fixed[name] = usual
        except (ConfigError, AttributeError):  # a module that the family names is gone
            fixed[name] = usual
        setattr(twin, name, usual)
    return adding, fixed


def _by_name(twin: PretrainedConfig, family: Family) -> dict[str, ParameterSpec]:
    spec = spec_of(meta_model(twin), "x", family)
    return {p.name: p for unit in (spec.embedding, *spec.layers, spec.head) for p in unit.parameters}


def _conditional(
    twins: tuple[PretrainedConfig, ...],
    family: Family,
    flags: Mapping[str, bool],
    sizes: list[dict[str, int]],
    unit: str,
) -> tuple[Shape, ...]:
    """Every parameter of a unit under any flags, in the order of the model with most of them."""
    found: dict[str, tuple[ParameterSpec, ...]] = {}
    lacking: dict[str, int] = {}
    under: dict[str, list[dict[str, bool]]] = {}
    for values in itertools.product((False, True), repeat=len(flags)):
        setting = dict(zip(flags, values, strict=True))
        specs = [spec_of(meta_model(_with(twin, setting)), "x", family) for twin in twins]
        rows = [_unit(spec, unit) for spec in specs]
        lacking |= _lacked_at_first(specs[0]) if unit == "layer" else {}
        for alike in zip(*rows, strict=True):
            found.setdefault(alike[0].name, alike)
            under.setdefault(alike[0].name, []).append(setting)
        names = [p.name for p in rows[0]]
        found = {**{n: found[n] for n in names}, **found} if len(names) >= len(found) else found
    every = 2 ** len(flags)
    shapes = (_shape(alike, sizes, _when(under[name], every)) for name, alike in found.items())
    return tuple(shape.model_copy(update={"after": lacking.get(shape.name, 0)}) for shape in shapes)


def _unit(spec: ModelSpec, unit: str) -> tuple[ParameterSpec, ...]:
    """The parameters of a unit; of a layer, those of the last."""
    return spec.layers[-1].parameters if unit == "layer" else spec.unit(unit).parameters


def _lacked_at_first(spec: ModelSpec) -> dict[str, int]:
    """Parameters that the first layers lack, and how many layers they are; all others have the same."""
    *others, last = spec.layers
    lacking = {p.name: kind.count for kind in others[:1] for p in last.parameters if p not in kind.parameters}
    if len(others) > 1 or any(p not in last.parameters for kind in others for p in kind.parameters):
        raise ConfigError("layers are of several kinds in no simple way; keep the type out of the data")
    return lacking


def _with(twin: PretrainedConfig, flags: Mapping[str, bool]) -> PretrainedConfig:
    changed = copy.deepcopy(twin)
    for name, flag in flags.items():
        setattr(changed, name, flag)
    return changed


def _when(settings: list[dict[str, bool]], every: int) -> dict[str, bool]:
    """The flags that all ``settings`` share, if these alone decide."""
    shared = {n: v for n, v in settings[0].items() if all(setting[n] == v for setting in settings)}
    if len(settings) * 2 ** len(shared) != every:
        raise ConfigError("a parameter depends on flags in no simple way; keep the type out of the data")
    return shared


def _shape(alike: tuple[ParameterSpec, ...], sizes: list[dict[str, int]], when: dict[str, bool]) -> Shape:
    first = alike[0]
    shape = tuple(_formula(dims, sizes) for dims in zip(*(p.shape for p in alike), strict=True))
    cuts = [p.cut for p in alike if p.cut is not None]
    if not cuts:
        return Shape(name=first.name, shape=shape, experts=first.experts, when=when)
    segments = tuple(_formula(blocks, sizes) for blocks in zip(*(cut.segments for cut in cuts), strict=True))
    return Shape(
        name=first.name,
        shape=shape,
        dim=cuts[0].dim,
        segments=segments,
        uneven=cuts[0].uneven,
        experts=first.experts,
        when=when,
    )


def _used(units: list[tuple[Shape, ...]], counted: dict[str, str]) -> set[str]:
    """The keys that formulas read, directly or not."""
    formulas = [f for unit in units for shape in unit for f in (*shape.shape, *shape.segments)] + list(counted.values())
    made = {"num_patches": "image_size*patch_size", "num_positions": "max_position_embeddings*pad_token_id"}
    formulas = [*formulas, PER_TOKEN, *(keys for name, keys in made.items() if any(name in f for f in formulas))]
    return {n for f in formulas for n in f.replace("+", "*").split("*") if not n.isdigit()}


def _defaults(
    config: PretrainedConfig, family: Family, used: set[str], flags: Mapping[str, bool]
) -> dict[str, bool | int | float | str]:
    """What a file may leave out: keys and values' heads, a head's width, positions, flags."""
    found: dict[str, bool | int | float | str] = {**flags}
    if family.head is not None:
        found["tie_word_embeddings"] = bool(config.tie_word_embeddings)
    kv_key, dim_key = _key(config, "num_key_value_heads"), _key(config, "head_dim")
    fresh = type(config)()
    kv_heads = getattr(fresh, kv_key) if kv_key else None
    own = kv_key is not None and _is_given(fresh, kv_key)
    found["num_key_value_heads"] = kv_heads if own and isinstance(kv_heads, int) else "num_attention_heads"
    head_dim = getattr(fresh, dim_key, None) if dim_key else None
    found["head_dim"] = head_dim if isinstance(head_dim, int) and _is_given(fresh, "head_dim") else HEAD_DIM
    both_ways = () if family.stacks[0].causal else WINDOWS
    found |= {name: rate for name in (*BEYOND_RINGS, *both_ways) if (rate := getattr(fresh, name, None))}
    for name in LEFT_OUT:
        if name in used and (key := _key(config, name)) and isinstance(getattr(fresh, key), int):
            found[name] = getattr(fresh, key)
    if "n_inner" in used:
        found["n_inner"] = "4*hidden_size"
    return found


def _is_given(config: PretrainedConfig, key: str) -> bool:
    """Whether a type has a number of its own for ``key``, rather than one that follows from others."""
    heads: dict[str, Any] = {config.attribute_map.get("num_attention_heads", "num_attention_heads"): 2}
    other = type(config)(**heads)
    return getattr(other, key) == getattr(config, key) and other.num_attention_heads != config.num_attention_heads


def _layer_sizes(specs: list[ModelSpec], sizes: list[dict[str, int]], config: PretrainedConfig) -> dict[str, str]:
    found = {"num_layers": "num_hidden_layers", "hidden_size": "hidden_size"}
    found["vocab_size"] = _formula(tuple(spec.vocab_size for spec in specs), sizes)
    for name in ("ffn_size", "num_heads", "num_kv_heads", "head_dim"):
        values = tuple(getattr(spec.layers[0], name) for spec in specs)
        found[name] = _formula(values, sizes)
    if (longest := tuple(spec.max_seq_len for spec in specs)) != (MAX_TOKENS, MAX_TOKENS):
        found["max_seq_len"] = _formula(longest, sizes)
    if specs[0].layers[0].num_experts:
        found["num_experts"] = _formula(tuple(spec.layers[0].num_experts for spec in specs), sizes)
        found["experts_per_token"] = PER_TOKEN
    return found
