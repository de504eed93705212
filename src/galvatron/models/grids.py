"""Images as patches, one after the other, with a grid each: any number a text, of any size (Qwen-VL).

Takes a config; says what a batch must be, and which images are of which texts.  A batch has the patches of all its
images, [patches, ...], and their grids, [images, 3] (frames, rows and columns of patches), in the order in which its
texts have tokens that stand for them: one for every square of ``merge`` x ``merge`` patches.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .images import COLOURS, image_token
from .sizes import HEAD_DIM
from .tasks import class_for, known_task

PIXELS, GRIDS, KINDS = "pixel_values", "image_grid_thw", "mm_token_type_ids"
"""Inputs: patches, grids, and what each token of a text is: 1 of an image, 0 of a word."""
VIDEOS = ("pixel_values_videos", "video_grid_thw")
SIDES = ((1, 1), (2, 1), (1, 2))
"""Of random images, in squares."""


@dataclass(frozen=True)
class Grids:
    """How a model takes images: the ``token`` that stands for a square of patches, its side, and a patch's elements."""

    token: int
    merge: int
    patch: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Grids | None:
        """None where a model's images are no patches with grids."""
        token, seen = image_token(config), getattr(config, "vision_config", None)
        merge = getattr(seen, "spatial_merge_size", None)
        if token is None or not isinstance(merge, int) or known_task(config) != "vision_language":
            return None
        takes = inspect.signature(class_for(config, "vision_language").forward).parameters
        if not {PIXELS, GRIDS, KINDS} <= takes.keys():
            return None
        colours = getattr(seen, "in_channels", getattr(seen, "num_channels", COLOURS))
        side, frames = (_first(getattr(seen, name, 1)) for name in ("patch_size", "temporal_patch_size"))
        return cls(token, merge, colours * frames * side * side)

    def of_rows(self, inputs: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
        """The patches and grids of some ``rows`` of a batch's texts; nothing where they have no images."""
        if GRIDS not in inputs:
            return {}
        grids, owners = inputs[GRIDS].cpu(), _runs(inputs["input_ids"].cpu() == self.token)[0]
        images = torch.cat([(owners == row).nonzero().flatten() for row in rows])
        if not len(images):
            return {}
        patches = inputs[PIXELS].split(grids.prod(dim=-1).tolist())
        return {PIXELS: torch.cat([patches[image] for image in images.tolist()]), GRIDS: grids[images]}

    def problem(self, inputs: Mapping[str, Tensor]) -> str | None:
        """The rule that a batch on the CPU breaks, as a sentence; None if it breaks none."""
        if given := [name for name in VIDEOS if name in inputs]:
            return f"{given[0]} is of videos, which are not trained on; give images ({PIXELS}, {GRIDS})"
        if (PIXELS in inputs) != (GRIDS in inputs):
            return f"{PIXELS} and {GRIDS} go together; give both, as the processor does, or none"
        stands, kinds = inputs["input_ids"] == self.token, inputs.get(KINDS)
        if kinds is None and GRIDS in inputs:
            return f"images need {KINDS}, 1 for their tokens and 0 for others; give what the processor gives"
        if kinds is not None and (kinds.shape != stands.shape or bool((kinds != stands).any())):
            return (
                f"{KINDS} must be 1 where input_ids stand for an image, and 0 elsewhere; give what the processor gives"
            )
        if GRIDS in inputs:
            return self._unlike(inputs[GRIDS], inputs[PIXELS], stands)
        if bool(stands.any()):
            return f"input_ids have {int(stands.sum())} tokens of images but there are none; give {PIXELS} and {GRIDS}"
        return None

    def _unlike(self, grids: Tensor, pixels: Tensor, stands: Tensor) -> str | None:
        """That grids, patches and texts are not of the same images."""
        if grids.dtype != torch.int64 or grids.dim() != 2 or grids.shape[1] != 3:  # frames, rows, columns
            return f"{GRIDS} must be int64 [images, 3], got {list(grids.shape)}; give what the processor gives"
        if bool((grids < 1).any()) or bool((grids[:, 1:] % self.merge).any()):
            return f"{GRIDS} must have rows and columns by {self.merge}, got {grids.tolist()}; resize the images"
        patches = grids.prod(dim=-1)
        if tuple(pixels.shape) != (int(patches.sum()), self.patch):
            return (
                f"{PIXELS} must be [{int(patches.sum())}, {self.patch}], the patches of {len(grids)} grids, got "
                f"{list(pixels.shape)}; give both of the same images"
            )
        rows, tokens = _runs(stands)
        if len(rows) != len(grids):
            return (
                f"input_ids have {len(rows)} images, each a run of token {self.token}, but {GRIDS} has {len(grids)}; "
                "give those of the whole batch, with another token between images of a text"
            )
        wrong = (tokens != patches // self.merge**2).nonzero().flatten().tolist()
        if not wrong:
            return None
        image = wrong[0]
        return (
            f"image {image}, of row {int(rows[image])}, has {int(tokens[image])} tokens in input_ids, but its grid "
            f"{grids[image].tolist()} makes {int(patches[image]) // self.merge**2}; give images in the order of texts"
        )

    def inputs(
        self, ids: Tensor, sides: Sequence[Sequence[tuple[int, int]]], draw: Callable[[tuple[int, int]], Tensor]
    ) -> dict[str, Tensor]:
        """``ids`` with images of ``sides``, in squares, from the second token of each row on, and what goes with it."""
        grids: list[list[int]] = []
        for row, own in zip(ids, sides, strict=True):
            place = 1
            for high, wide in own:
                row[place : place + high * wide] = self.token
                place += high * wide + 1
                grids.append([1, high * self.merge, wide * self.merge])
        found = {"input_ids": ids, KINDS: (ids == self.token).long()}
        if grids:
            found[PIXELS] = draw((sum(map(math.prod, grids)), self.patch))
            found[GRIDS] = torch.tensor(grids, device=ids.device)
        return found

    def smallest(self, device: torch.device) -> dict[str, Tensor]:
        """The inputs of an image that one token would stand for: what is seen where texts have none."""
        grid = torch.tensor([[1, self.merge, self.merge]], device=device)
        return {PIXELS: torch.zeros(self.merge**2, self.patch, device=device), GRIDS: grid}


def positions_beside_images(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Where tokens of a batch stand, int64 [3, texts, S] on the CPU: those of an image by frame, row and column.

    As the model itself counts; recognition finds out whether it does so in this way.
    """
    given = {name: inputs[name].cpu() for name in ("input_ids", GRIDS, KINDS) if name in inputs}
    count: Callable[..., Tensor | None] = model.base_model.compute_3d_position_ids  # type: ignore[assignment]
    others = [name for name, of in inspect.signature(count).parameters.items() if of.default is of.empty]
    counted = count(**{**dict.fromkeys(others), **given})
    texts, length = inputs["input_ids"].shape
    return torch.arange(length).expand(3, texts, length) if counted is None else counted


def shrink_grids(twin: PretrainedConfig, config: PretrainedConfig) -> None:
    """Give ``twin`` windows, chosen layers and shares of rotary tables that fit its other sizes, as ``config`` has."""
    text, seen, of = twin.get_text_config(), twin.vision_config, config.vision_config
    count = of.num_hidden_layers
    for name, value in of.to_dict().items():
        if name.endswith("_indexes"):
            setattr(seen, name, [index * seen.num_hidden_layers // count for index in value])
    if hasattr(seen, "window_size"):
        seen.window_size = 2 * seen.spatial_merge_size * _first(seen.patch_size)
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_type" in rope:
        pairs = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
        sections = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
        with suppress(StrictDataclassFieldValidationError):  # tables of another kind
            text.rope_parameters = {**rope, "mrope_section": sections}


def usual_sides(seq_len: int) -> tuple[tuple[int, int], ...]:
    """Of a square image for which half of a text of ``seq_len`` tokens stands, or less."""
    side = math.isqrt(seq_len // 2)
    return ((side, side),) if side else ()


def random_sides(row: int, seq_len: int) -> tuple[tuple[int, int], ...]:
    """Of the images of a ``row``: one, two, none and so on, of several sizes, as far as there is room."""
    sides = tuple(SIDES[(row + nth) % len(SIDES)] for nth in range((row + 1) % 3))
    return sides if sum(1 + math.prod(side) for side in sides) < seq_len else ()


def _first(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _runs(stands: Tensor) -> tuple[Tensor, Tensor]:
    """Of every run of tokens that stand for an image, row by row: its row, and how many they are."""
    edges = F.pad(stands.int(), (1, 1)).diff(dim=1)
    begins, ends = (edges == 1).nonzero(), (edges == -1).nonzero()
    return begins[:, 0], ends[:, 1] - begins[:, 1]
