"""Shapes of a family whose data no formula holds: Swin, whose sizes are lists.

Takes a Config; gives a ModelSpec whose parameters have Hugging Face's names.  Of vision models a sequence is the
image's patches, and the vocabulary is the classes.
"""

from __future__ import annotations

import itertools
import math

from galvatron.core.errors import ConfigError
from galvatron.core.model import Cut, Joint, LayerKind, ModelSpec, ParameterSpec, UnitSpec

from .parts import Config, chain, column, layer_norm, multi_head, row, whole


def swin(config: Config, name: str) -> ModelSpec:
    """Swin: stages of doubling width over a quarter of the patches each, attention within windows.

    The merges between stages, some 2% of the parameters, join them and count with the embedding.
    """
    embed, depths, heads = config.size("embed_dim"), config.sizes("depths"), config.sizes("num_heads")
    if len(depths) != len(heads) or len(depths) < 2:
        raise ConfigError(
            f"depths={list(depths)} and num_heads={list(heads)} need one entry for each of two stages or more; "
            "give both equal lengths"
        )
    patch, channels = config.size("patch_size"), config.size("num_channels")
    classes, last = config.num_labels(), embed * 2 ** (len(depths) - 1)
    grids, ends = _grids(config, len(depths)), list(itertools.accumulate(depths))
    kinds = [_swin_stage(config, stage, ends[stage] - depths[stage], grid) for stage, grid in enumerate(grids)]
    merges = [_swin_merge(stage, embed * 2**stage) for stage in range(len(depths) - 1)]
    positions = whole("swin.embeddings.position_embeddings", 1, math.prod(grids[0]), embed)
    return ModelSpec(
        name=name,
        family="swin",
        task="image_classification",
        ends="whole",
        stacks=len(depths),
        joints=tuple(
            Joint(layer=end, parameters=tuple(p.name for p in merge)) for end, merge in zip(ends, merges, strict=False)
        ),
        layers=tuple(kinds),
        vocab_size=classes,
        max_seq_len=math.prod(grids[0]),
        tied_embeddings=False,
        embedding=UnitSpec(
            parameters=chain(
                [positions] if config.get("use_absolute_embeddings", False) else [],
                [whole("swin.embeddings.patch_embeddings.projection.weight", embed, channels, patch, patch)],
                [whole("swin.embeddings.patch_embeddings.projection.bias", embed)],
                layer_norm("swin.embeddings.norm", embed),
                *merges,
            )
        ),
        head=UnitSpec(
            parameters=chain(
                layer_norm("swin.layernorm", last),
                [whole("classifier.weight", classes, last), whole("classifier.bias", classes)],
            )
        ),
    )


def _grids(config: Config, stages: int) -> list[tuple[int, int]]:
    """Patches along height and width in every stage; what is left over is filled up."""
    image, patch, window = config.sides("image_size", 224), config.size("patch_size"), config.size("window_size")
    if patch > min(image):
        raise ConfigError(
            f"patch_size={patch} must not exceed image_size={min(image)}; give a Hugging Face config.json"
        )
    height, width = (-(-side // patch) for side in image)
    grids = [(-(-height // 2**stage), -(-width // 2**stage)) for stage in range(stages)]
    if window > min(grids[-1]):
        raise ConfigError(
            f"window_size={window} must not exceed the {min(grids[-1])} patches a side that the last of {stages} "
            "stages sees; give a larger image_size"
        )
    return grids


def _swin_stage(config: Config, stage: int, first: int, grid: tuple[int, int]) -> LayerKind:
    hidden, heads = config.size("embed_dim") * 2**stage, config.sizes("num_heads")[stage]
    count, window = config.sizes("depths")[stage], config.size("window_size")
    ffn, bias = int(config.get("mlp_ratio", 4.0) * hidden), config.get("qkv_bias", True)
    table = ParameterSpec(
        name="attention.relative_position_bias.relative_position_bias_table",
        shape=((2 * window - 1) ** 2, heads),
        cut=Cut(dim=1, segments=(heads,)),
    )
    by_heads = Cut(dim=0, segments=(heads,))
    parameters = chain(
        *(column(f"attention.{name}", hidden, hidden, by_heads, bias) for name in ("q_proj", "k_proj", "v_proj")),
        row("attention.o_proj", hidden, hidden, heads, True),
        [table],
        layer_norm("layernorm_before", hidden),
        layer_norm("layernorm_after", hidden),
        column("mlp.fc1", ffn, hidden, Cut(dim=0, segments=(ffn,)), True),
        row("mlp.fc2", hidden, ffn, ffn, True),
    )
    kind = multi_head(count, hidden, ffn, heads, parameters, f"layers {first}-{first + count - 1}", causal=False)
    seen = {"fixed_tokens": math.prod(grid), "attention_span": window**2, "windowed": True}
    drops = config.raw("drop_path_rate") != 0 or bool(config.raw("hidden_dropout_prob"))  # paths are unless told not to
    return kind.model_copy(update={**seen, "drops_attention": True, "asks_for_attention": False, "needs_output": drops})


def _swin_merge(index: int, hidden: int) -> tuple[ParameterSpec, ...]:
    """Four neighbouring patches become one of twice the width."""
    prefix = f"swin.encoder.layers.{index}.downsample"
    return chain(
        [whole(f"{prefix}.reduction.weight", 2 * hidden, 4 * hidden)], layer_norm(f"{prefix}.norm", 4 * hidden)
    )
