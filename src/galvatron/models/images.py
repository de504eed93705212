"""Images as models take them, and how many tokens of a text each takes: as many as the model makes of it.

Takes a config; runs what sees images on meta, where nothing has values, if the config does not say.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from galvatron.core.errors import UnfitError

from .tasks import auto_class, for_task, task_of

IMAGE_TOKENS = ("image_token_id", "image_token_index")
"""Keys of configs: the id that stands in a text where an image's tokens go."""
COLOURS = 3
"""Where a config does not say how many channels an image has."""
_lengths: dict[str, int] = {}


def image_shape(config: PretrainedConfig, rows: int) -> tuple[torch.dtype, tuple[int, ...]]:
    """The dtype and shape of a batch of images: [rows, channels, height, width].

    Raises:
        UnfitError: the config does not say how large they are.
    """
    seen = getattr(config, "vision_config", config)
    size = getattr(seen, "image_size", None)
    if size is None:
        raise UnfitError(
            config.model_type,
            "has no image_size in its config: it takes images of any size, or patches",
            "choose a type whose images are of one size",
        )
    height, width = (size, size) if isinstance(size, int) else size
    return torch.float32, (rows, getattr(seen, "num_channels", COLOURS), height, width)


def image_token(config: PretrainedConfig) -> int | None:
    """The id that stands for an image's tokens; None if there is none."""
    return next((value for name in IMAGE_TOKENS if isinstance(value := getattr(config, name, None), int)), None)


def image_length(config: PretrainedConfig) -> int:
    """The number of tokens that stand for an image; 0 where none does."""
    if image_token(config) is None:
        return 0
    said: int | None = getattr(config, "image_seq_length", None)
    return made_length(config) if said is None else said


def made_length(config: PretrainedConfig) -> int:
    """The number that a model makes of an image, whatever its config says."""
    key: str = config.to_json_string(use_diff=False)
    if key not in _lengths:
        _lengths[key] = _made(config)
    return _lengths[key]


def _made(config: PretrainedConfig) -> int:
    """The features of one image, by its last dim."""
    with torch.device("meta"):
        model = auto_class(config).from_config(for_task(config, task_of(config)), attn_implementation="eager")
        dtype, shape = image_shape(config, 1)
        seeing = model if hasattr(model, "get_image_features") else model.base_model
        features = seeing.get_image_features(torch.zeros(shape, dtype=dtype))
    found = getattr(features, "pooler_output", features)
    parts: list[Tensor] = list(found) if isinstance(found, (list, tuple)) else [found]
    return sum(part.numel() // part.shape[-1] for part in parts)
