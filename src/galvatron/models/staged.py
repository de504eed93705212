"""Twins of types whose layers stand in stages of growing width over fewer and fewer patches (Swin).

Takes a config that says ``depths``; gives sizes of stages, windows and images that fit each other.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from galvatron.core.errors import ConfigError
from galvatron.core.numbers import MAX_LAYERS

from .sizes import LAYERS, PATCH

KEYS = ("depths", "num_heads", "embed_dim")
HEADS, HEAD_DIM, WINDOW, GRID = 6, 4, 2, 3
"""Of the first stage; of all; how many patches a side has in the last one: several windows, the last ones filled up."""


def is_staged(config: PretrainedConfig) -> bool:
    """Whether ``config`` says depths and heads by stage, and the first stage's width."""
    depths, heads, width = (getattr(config, name, None) for name in KEYS)
    is_listed = all(isinstance(sizes, (list, tuple)) and len(sizes) > 1 for sizes in (depths, heads))
    return is_listed and isinstance(width, int) and len(depths) == len(heads)  # type: ignore[arg-type]


def check_stages(config: PretrainedConfig) -> None:
    """Raise ConfigError where a stage of ``config`` has no layers, or a window is larger than any image's grid."""
    if not is_staged(config):
        return
    if any(depth < 1 for depth in config.depths) or sum(config.depths) > MAX_LAYERS:
        raise ConfigError(
            f"depths={list(config.depths)} of a {config.model_type} config must be one layer or more each, and "
            f"{MAX_LAYERS:,} together at most; mend its config.json"
        )
    sides = [getattr(config, name, 0) for name in ("image_size", "patch_size", "window_size")]
    image, patch, window = (max(side) if isinstance(side, (list, tuple)) else int(side) for side in sides)
    if window * patch > image:
        raise ConfigError(
            f"window_size={window} of a {config.model_type} config must not exceed the {image // patch} patches a side "
            f"of its image_size={image}; mend its config.json"
        )


def shrink_stages(twin: PretrainedConfig, config: PretrainedConfig, *, keep_images: bool) -> None:
    """Give ``twin`` stages as ``config`` has them, each a few narrow layers; ``keep_images``: and windows as they are.

    Heads grow from stage to stage as the config's do, and so does their sum of widths.
    """
    stages = len(config.depths)
    twin.depths = [LAYERS // 2] * stages
    twin.num_heads = [HEADS * heads // config.num_heads[0] for heads in config.num_heads]
    twin.embed_dim = HEADS * HEAD_DIM
    if isinstance(getattr(config, "hidden_size", None), int):
        twin.hidden_size = twin.embed_dim * config.hidden_size // config.embed_dim
    if isinstance(getattr(config, "num_layers", None), int):
        twin.num_layers = config.num_layers
    if isinstance(getattr(config, "window_size", None), int) and not keep_images:
        twin.window_size = WINDOW
        twin.image_size = PATCH * GRID * 2 ** (stages - 1)
