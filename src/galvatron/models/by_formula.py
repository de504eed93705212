"""The sizes of a family as formulas of its config's keys: which keys there are, and what files leave out.

Takes a type's config, with those within it; gives twins in two sizes, formulas that hold for both, and defaults.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from galvatron.core.errors import ConfigError
from galvatron.core.family import BEYOND_RINGS, DROPS, WINDOWS, Family
from galvatron.core.formulas import num_patches, value
from galvatron.core.known import USUAL_DEFAULTS, Shape
from galvatron.core.tasks import CLASSIFICATION, Task

from .heads import kv_names
from .load import meta_model
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
    "d_ff",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "decoder_attention_heads",
    "relative_attention_num_buckets",
    "projection_dim",
    "decoder_vocab_size",
    "max_source_positions",
    "max_target_positions",
    "num_mel_bins",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "qk_head_dim",
    "v_head_dim",
    "n_shared_experts",
    "first_k_dense_replace",
    "embed_dim",
    "out_hidden_size",
    "in_channels",
    "temporal_patch_size",
    "spatial_merge_size",
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
    "relative_attention_num_buckets",
    "projection_dim",
    "max_source_positions",
    "max_target_positions",
    "num_mel_bins",
)
"""Sizes that files leave out where they are the type's own."""
OTHERS = {
    "num_decoder_layers": "num_hidden_layers",
    "decoder_vocab_size": "vocab_size",
    "n_inner": "4*hidden_size",
    "qk_head_dim": "qk_nope_head_dim+qk_rope_head_dim",
}
"""Sizes that follow from others where files leave them out."""
PER_TOKEN = "num_experts_per_tok"
SEEN = {
    "num_heads": "vision_config.num_attention_heads",
    "merge": "vision_config.spatial_merge_size",
    "window": "vision_config.window_size*vision_config.patch_size",
    "whole_layers": "vision_config.fullatt_block_indexes",
}
"""What a tower is described by (``core.model.Tower``)."""
DECODER_HEAD_DIM, DECODER_HEADS = "decoder_head_dim", "decoder_attention_heads"
TIES = "tie_word_embeddings"
NO_KEY = "-"
"""What no file has, for a flag that a type sets whatever files say."""
DEPTHS = ("num_hidden_layers", "num_decoder_layers", "decoder_layers")
"""Keys that may count a stack's layers."""
WORDS_OF_FLAGS = {"is_gated_act": "feed_forward_proj^gated"}
"""Flags that a config makes of how the word of another key begins."""
Default = bool | int | float | str | list[int]
MAX_FACTOR, MAX_OFFSET = 8, 2


def parts_of(config: PretrainedConfig) -> Iterator[tuple[str, PretrainedConfig]]:
    """``config`` and those within it, each with what goes before its keys."""
    yield "", config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            yield f"{name}.", part


def names_in(config: PretrainedConfig) -> dict[str, str]:
    """What files call a size, where that is another name."""
    names = (*NAMES, *MORE, "num_hidden_layers")
    keys = ((prefix, name, key_of(part, name)) for prefix, part in parts_of(config) for name in names)
    found = {f"{prefix}{name}": key for prefix, name, key in keys if key and key != name}
    return found | ({TIES: NO_KEY} if is_always_tied(config) else {})


def is_always_tied(config: PretrainedConfig) -> bool:
    """Whether a type ties embedding and head whatever its files say."""
    kind: Any = type(config)
    return TIES in config.to_dict() and bool(kind(**{TIES: False}).to_dict().get(TIES))


def with_head_dim(config: PretrainedConfig) -> PretrainedConfig:
    """With a width of heads of its own, if the modules read one that the type's config leaves open."""
    if getattr(config, "head_dim", None) is not None or not key_of(config, "num_attention_heads"):
        return config
    wide = twin_config(config)
    shapes = [p.shape for p in meta_model(wide).parameters()]
    wide.head_dim = 2 * wide.hidden_size // wide.num_attention_heads
    if [p.shape for p in meta_model(wide).parameters()] != shapes:
        config.head_dim = config.hidden_size // config.num_attention_heads
    return config


def key_of(config: PretrainedConfig, name: str) -> str | None:
    """What ``config``'s files call a size; None if they have none."""
    names = kv_names(config) if name == "num_key_value_heads" else (name,)
    keys = (config.attribute_map.get(own, own) for own in names)
    return next((key for key in keys if key in config.to_dict()), None)


def two_sizes(config: PretrainedConfig) -> tuple[PretrainedConfig, PretrainedConfig]:
    """Twins in which no two sizes are equal that need not be."""
    twins = twin_config(config), twin_config(config)
    for which, twin in enumerate(twins):
        for index, (prefix, part) in enumerate(parts_of(twin)):
            _resize(part, which, index if prefix else 0, task_of(config))
        vision, text = (getattr(twin, f"{name}_config", twin) for name in ("vision", "text"))
        if hasattr(twin, "image_seq_length"):
            twin.image_seq_length = num_patches(vision.image_size, vision.patch_size)
        if hasattr(text, "projection_size"):
            text.projection_size = vision.hidden_size
    return twins


HEADS_OF = ((4, 6), (8, 10), (12, 14))
"""Of twins in two sizes, by which of their configurations it is."""


def _resize(twin: PretrainedConfig, which: int, index: int, task: Task) -> None:
    """Give ``twin``, a configuration or one within it, sizes that no other has."""
    explicit = getattr(twin, key_of(twin, "head_dim") or "", None) is not None
    heads, head_dim, more = HEADS_OF[index][which], (16, 20)[which] + 2 * index, index * (40, 60)[which]
    ffn, hidden = (56, 88)[which] + more, (72, 140)[which] + more if explicit else heads * head_dim
    values = {
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "ffn_dim": ffn,
        "d_ff": ffn - 2,
        "encoder_ffn_dim": ffn - 2,
        "decoder_ffn_dim": ffn - 6,
        "decoder_attention_heads": 2 * heads if which else heads // 2,
        "relative_attention_num_buckets": 2 * heads + 2,
        "projection_dim": 30 + heads,
        "decoder_vocab_size": 117 + heads,
        "max_source_positions": (11, 13)[which],
        "max_target_positions": 70 + heads,
        "num_mel_bins": (5, 7)[which],
        "n_inner": ffn,
        "vocab_size": 97 + heads,
        "max_position_embeddings": 60 + heads,
        "word_embed_proj_dim": hidden,
        "moe_intermediate_size": ffn - 4,
        "num_experts": heads + 3,
        "num_local_experts": 2 * heads + 6,
        "q_lora_rank": 30 + heads,
        "kv_lora_rank": 20 + heads,
        "qk_nope_head_dim": head_dim - 6,
        "qk_rope_head_dim": head_dim,
        "qk_head_dim": 2 * head_dim - 6,
        "v_head_dim": head_dim - 4,
        "n_shared_experts": 1 + which,
        "first_k_dense_replace": 2 - which,
        "hidden_dim": ffn,
        "embedding_size": 20 + heads,
        "embed_dim": 5 * heads,
        "out_hidden_size": 50 + 7 * heads,
        "in_channels": (1, 3)[which],
        "temporal_patch_size": (3, 2)[which],
        "spatial_merge_size": (2, 4)[which],
        "type_vocab_size": 1 + heads // 2,
        "num_channels": (1, 3)[which],
        "patch_size": (2, 3)[which],
        "image_size": (heads // 2) * heads if index == 0 else (2, 3)[which] * heads,
        "mlp_ratio": heads - 1,
        "num_labels": heads + 1,
        "num_key_value_heads": heads if key_of(twin, "kv_lora_rank") else heads // 2,
    }
    for name, size in values.items():
        key = key_of(twin, name)
        if name == "num_labels" and task in CLASSIFICATION:
            twin.num_labels = size
        elif key and (name == "n_inner" or isinstance(getattr(twin, key, None), int)):
            setattr(twin, key, size)


def sizes_in(twin: PretrainedConfig) -> dict[str, int]:
    """Every size of ``twin``, and of the configurations within it, by our names."""
    found: dict[str, int] = {}
    for prefix, part in parts_of(twin):
        found |= {f"{prefix}{name}": size for name, size in _sizes_of(part).items()}
    if task_of(twin) in CLASSIFICATION:
        found["num_labels"] = twin.num_labels or 1
    return found


def _sizes_of(part: PretrainedConfig) -> dict[str, int]:
    """The sizes of one configuration, by our names."""
    found = {name: getattr(part, key) for name in (*NAMES, *MORE) if (key := key_of(part, name))}
    sizes = {name: size for name, size in found.items() if isinstance(size, int)}
    if key_of(part, "image_size"):
        sizes["num_patches"] = num_patches(part.image_size, part.patch_size)
    padding: object = getattr(part, "pad_token_id", None)
    if "max_position_embeddings" in sizes and isinstance(padding, int):
        sizes["num_positions"] = sizes["max_position_embeddings"] - padding - 1
    if "num_attention_heads" in sizes:
        sizes.setdefault("num_key_value_heads", sizes["num_attention_heads"])
        sizes.setdefault("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    if "qk_rope_head_dim" in sizes:  # which the type calls head_dim, and files do not
        sizes.pop("head_dim")
        sizes["latent_head_dim"] = (sizes["qk_head_dim"] + sizes["v_head_dim"]) // 2
    if DECODER_HEADS in sizes:
        sizes[DECODER_HEAD_DIM] = sizes["hidden_size"] // sizes[DECODER_HEADS]
    return sizes


def find_formula(values: tuple[int, ...], sizes: list[dict[str, int]]) -> str:
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
    merges = [name for name in names if name.endswith("spatial_merge_size")]
    yield from (f"{a}*{merge}*{merge}" for merge in merges for a in names)
    yield from (f"3*{a}*{b}" for a, b in itertools.combinations(names, 2))
    latents = [name for name in names if name.startswith(("kv_lora", "qk_", "v_head"))]
    yield from (f"{a}+{b}" for a, b in itertools.combinations(latents, 2))
    yield from (f"num_attention_heads*{a}+num_attention_heads*{b}" for a, b in itertools.combinations(latents, 2))
    for prefix in (name.removesuffix("num_attention_heads") for name in names if name.endswith("num_attention_heads")):
        yield f"{prefix}num_attention_heads*{prefix}head_dim+2*{prefix}num_key_value_heads*{prefix}head_dim"


def used_keys(units: list[tuple[Shape, ...]], counted: list[dict[str, str]]) -> set[str]:
    """The keys that formulas read, directly or not."""
    formulas = [f for unit in units for shape in unit for f in shape.shape]
    formulas += [shape.each for unit in units for shape in unit if shape.each]
    formulas += [formula for sizes in counted for formula in sizes.values()]
    names = {n for f in formulas for n in f.replace("+", "*").split("*") if not n.isdigit()} | {PER_TOKEN}
    made = {
        "num_patches": ("image_size", "patch_size"),
        "num_positions": ("max_position_embeddings", "pad_token_id"),
        "latent_head_dim": ("qk_head_dim", "v_head_dim"),
    }
    prefixed = ((name[: name.rfind(".") + 1], made.get(name.rpartition(".")[2], ())) for name in names)
    return names | {f"{prefix}{key}" for prefix, keys in prefixed for key in keys}


def defaults_in(
    config: PretrainedConfig, family: Family, used: set[str], flags: Mapping[str, bool]
) -> dict[str, Default]:
    """What a file may leave out: keys and values' heads, a head's width, positions, flags that are set."""
    found: dict[str, Default] = {
        name: WORDS_OF_FLAGS.get(name, usual) for name, usual in flags.items() if usual or name in WORDS_OF_FLAGS
    }
    if family.head is not None and config.tie_word_embeddings:
        found[TIES] = True
    fresh = type(config)()
    both_ways = () if family.stacks[0].causal else WINDOWS
    taken = (stack.taken_at for stack in family.stacks if stack.taken_at is not None)
    found |= {
        name: rate for name in (*BEYOND_RINGS, *DROPS, *both_ways, *taken) if (rate := getattr(fresh, name, None))
    }
    for prefix, part in parts_of(fresh):
        found |= {f"{prefix}{name}": value for name, value in _defaults_of(part, prefix, used).items()}
    return found | {name: formula for name, formula in OTHERS.items() if name in used}


def _defaults_of(fresh: PretrainedConfig, prefix: str, used: set[str]) -> dict[str, Default]:
    """Sizes that files leave out of a configuration, or of one within it: there, all that are those of its own type.

    A type may give a whole part, if files leave it out, other sizes than those of the part's type; these are asked for.
    """
    usual = type(fresh)()
    found: dict[str, Default] = {}
    kv_key, dim_key = key_of(fresh, "num_key_value_heads"), key_of(fresh, "head_dim")
    for name, key in (("num_key_value_heads", kv_key), ("head_dim", dim_key)):  # else USUAL_DEFAULTS
        size = getattr(fresh, key, None) if key and f"{prefix}{name}" in used else None
        if isinstance(size, int) and size and _is_given(fresh, str(key)):
            found[name] = size
    if f"{prefix}{DECODER_HEAD_DIM}" in used:
        found[DECODER_HEAD_DIM] = f"hidden_size/{DECODER_HEADS}"
    for name in (*NAMES, *MORE, *DEPTHS) if prefix else LEFT_OUT:
        key = key_of(fresh, name) if name not in USUAL_DEFAULTS and f"{prefix}{name}" in used else None
        if key and isinstance(getattr(fresh, key), int) and getattr(usual, key) == getattr(fresh, key):
            found[name] = getattr(fresh, key)
    for name in ("pad_token_id", "image_size", "window_size", "fullatt_block_indexes"):
        size = getattr(fresh, name, None)
        if prefix and f"{prefix}{name}" in used and getattr(usual, name, None) == size:
            found |= {name: size} if isinstance(size, int) else {name: list(size)} if isinstance(size, Sequence) else {}
    return found


def _is_given(config: PretrainedConfig, key: str) -> bool:
    """Whether a type has a number of its own for ``key``, rather than one that follows from others."""
    heads: dict[str, Any] = {config.attribute_map.get("num_attention_heads", "num_attention_heads"): 2}
    other = type(config)(**heads)
    return getattr(other, key) == getattr(config, key) and other.num_attention_heads != config.num_attention_heads
