"""Shapes of the family that is planned for and not trained: Swin.

Takes a Config; gives a ModelSpec whose parameters have Hugging Face's names.  Of vision models a sequence is the
image's patches, and the vocabulary is the classes.
"""

from __future__ import annotations

from galvatron.core.errors import ConfigError
from galvatron.core.model import Cut, LayerKind, ModelSpec, ParameterSpec, UnitSpec

from .parts import Config, attention, chain, column, layer_norm, multi_head, row, vocabulary, whole

SELF = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")


def swin(config: Config, name: str) -> ModelSpec:
    """Swin: stages of doubling width over a quarter of the patches each, attention within windows.

    The merges between stages, some 2% of the parameters, count with the embedding.
    """
    embed, depths, heads = config.size("embed_dim"), config.sizes("depths"), config.sizes("num_heads")
    if len(depths) != len(heads):
        raise ConfigError(
            f"depths={list(depths)} and num_heads={list(heads)} need one entry a stage each; give both equal lengths"
        )
    patch, window, channels = (config.size(key) for key in ("patch_size", "window_size", "num_channels"))
    classes, last = config.num_labels(), embed * 2 ** (len(depths) - 1)
    ratio = config.get("mlp_ratio", 4.0)
    kinds = (_swin_stage(i, depth, embed * 2**i, heads[i], ratio, window) for i, depth in enumerate(depths))
    merges = (_swin_merge(i, embed * 2**i) for i in range(len(depths) - 1))
    embedding = chain(
        [whole("swin.embeddings.patch_embeddings.projection.weight", embed, channels, patch, patch)],
        [whole("swin.embeddings.patch_embeddings.projection.bias", embed)],
        layer_norm("swin.embeddings.norm", embed),
        *merges,
    )
    return ModelSpec(
        name=name,
        family="swin",
        layers=tuple(kinds),
        vocab_size=classes,
        max_seq_len=_patches(config),
        tied_embeddings=False,
        embedding=UnitSpec(parameters=embedding),
        head=UnitSpec(parameters=_classifier("swin.layernorm", last, classes)),
    )


def _swin_stage(index: int, depth: int, hidden: int, heads: int, ratio: float, window: int) -> LayerKind:
    ffn = int(ratio * hidden)
    linears = _encoder_layer(SELF, hidden, heads, ffn, ("layernorm_before", "layernorm_after"))
    table = ParameterSpec(
        name="attention.self.relative_position_bias_table",
        shape=((2 * window - 1) ** 2, heads),
        cut=Cut(dim=1, segments=(heads,)),
    )
    kind = multi_head(depth, hidden, ffn, heads, (*linears, table), name=f"stage{index}", causal=False)
    return kind.model_copy(update={"tokens_divisor": 4**index, "attention_span": window**2})


def _swin_merge(index: int, hidden: int) -> tuple[ParameterSpec, ...]:
    """Four neighbouring patches become one of twice the width."""
    prefix = f"swin.encoder.layers.{index}.downsample"
    return chain(
        [whole(f"{prefix}.reduction.weight", 2 * hidden, 4 * hidden)], layer_norm(f"{prefix}.norm", 4 * hidden)
    )


def _encoder_layer(
    names: tuple[str, str, str, str], hidden: int, heads: int, ffn: int, norms: tuple[str, str]
) -> tuple[ParameterSpec, ...]:
    return chain(
        attention("", names, hidden, heads, heads, hidden // heads, bias=True),
        column("intermediate.dense", ffn, hidden, Cut(dim=0, segments=(ffn,)), True),
        row("output.dense", hidden, ffn, ffn, True),
        *(layer_norm(norm, hidden) for norm in norms),
    )


def _patches(config: Config) -> int:
    """How many patches an image has."""
    image, patch = config.size("image_size"), config.size("patch_size")
    if patch > image:
        raise ConfigError(f"patch_size={patch} must not exceed image_size={image}; give a Hugging Face config.json")
    return int((image // patch) ** 2)


def _classifier(norm: str, hidden: int, classes: int) -> tuple[ParameterSpec, ...]:
    return chain(
        layer_norm(norm, hidden),
        [vocabulary("classifier.weight", classes, hidden), vocabulary("classifier.bias", classes)],
    )
