"""What models of each task take: inputs by name."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import PretrainedConfig

from galvatron.core.errors import UnfitError
from galvatron.core.tasks import Task

from .grids import Grids, random_sides, usual_sides
from .images import image_length, image_shape, image_token

SOUND_SIZES = ("num_mel_bins", "max_source_positions")


def input_shapes(
    config: PretrainedConfig, task: Task, rows: int, seq_len: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of every input that a model cannot do without: ids [rows, seq_len], images, sounds.

    Raises:
        UnfitError: the config does not say of what sizes they are.
    """
    ids = (torch.int64, (rows, seq_len))
    if task == "image_classification":
        return {"pixel_values": image_shape(config, rows)}
    if task == "seq2seq_lm":
        return {"input_ids": ids, "decoder_input_ids": ids}
    if task == "speech_to_text":
        bins, positions = (getattr(config, name, None) for name in SOUND_SIZES)
        if bins is None or positions is None:
            raise UnfitError(
                config.model_type,
                f"does not have {' and '.join(SOUND_SIZES)} in its config: it takes other sounds than Whisper",
                "choose a type that takes its",
            )
        frames = (torch.float32, (rows, bins, 2 * positions))
        return {"input_features": frames, "decoder_input_ids": ids}
    if task in ("vision_language", "contrast"):
        return {"input_ids": ids, "pixel_values": image_shape(config, rows)}
    return {"input_ids": ids}


def blank_inputs(
    config: PretrainedConfig, task: Task, rows: int, seq_len: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Zeros of these shapes, with images where texts have them: of grids one a text, of half of its tokens at most."""
    if (grids := Grids.of(config)) is not None:
        ids = torch.zeros(rows, seq_len, dtype=torch.int64, device=device)
        return grids.inputs(ids, [usual_sides(seq_len)] * rows, partial(torch.zeros, device=device))
    shapes = input_shapes(config, task, rows, seq_len)
    made = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (dtype, shape) in shapes.items()}
    return _with_images(made, config, task)


def random_inputs(
    config: PretrainedConfig, task: Task, rows: int, seq_len: int, generator: torch.Generator, lowest: int = 0
) -> dict[str, Tensor]:
    """Ids of the vocabulary from ``lowest`` on, and normal numbers, of these shapes; of grids images of many sizes."""
    words, image = words_of(config), image_token(config)

    def drawn(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if dtype == torch.int64:
            ids = torch.randint(lowest, words, shape, generator=generator)
            return ids if image is None else torch.where(ids == image, lowest, ids)
        return torch.randn(shape, dtype=dtype, generator=generator)

    if (grids := Grids.of(config)) is not None:
        sides = [random_sides(row, seq_len) for row in range(rows)]
        return grids.inputs(drawn(torch.int64, (rows, seq_len)), sides, partial(torch.randn, generator=generator))
    made = {name: drawn(*shape) for name, shape in input_shapes(config, task, rows, seq_len).items()}
    return _with_images(made, config, task)


def words_of(config: PretrainedConfig) -> int:
    """The size of the vocabulary; 0 where there is none."""
    count: int = getattr(config.get_text_config(), "vocab_size", None) or 0
    return count


def _with_images(inputs: dict[str, Tensor], config: PretrainedConfig, task: Task) -> dict[str, Tensor]:
    """Put the image of every row at its beginning, as many of its tokens as the model makes of it."""
    image = image_token(config)
    if task == "vision_language" and image is not None:
        inputs["input_ids"][:, : image_length(config)] = image
    return inputs
