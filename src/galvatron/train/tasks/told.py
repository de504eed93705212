"""Vision and language: images and a text that goes on from them, a row each, of which answers alone are learnt.

Where the text names an image there are as many tokens in its place as the model makes of it.  Rows are padded behind
their text, which causal attention does not see: there is no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..rows import IGNORED_LABEL
from ..text import BadRecord, Skipped, good
from ..tokens import UNLEARNT, ids_of
from .images import Augmentation, Images, Picture

if TYPE_CHECKING:
    from ..data import Draw


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """The token that stands for a part of an image, and of how many parts a model makes one, if always of as many.

    ``before``, ``after``: what stands around an image that a text does not name.
    """

    token: int
    count: int = 0
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class ToldImages(Images):
    """``pictures`` and the ``told`` tokens of the text of each, with what is said of them (``tokens``).

    A text that does not name its image begins with it.  Rows are filled up with ``padding``.  ``skipped`` is told of
    texts that it allows to leave out.

    Raises:
        DataError: a text names more or fewer images than it has, or is longer than ``seq_len`` with them.
    """

    labelled = True

    def __init__(
        self,
        pictures: Sequence[Picture],
        told: Sequence[np.ndarray],
        processor: Any,
        seq_len: int,
        image: ImageTokens,
        padding: int,
        augmentation: Augmentation | None = None,
        skipped: Skipped | None = None,
    ) -> None:
        super().__init__(pictures, processor, augmentation)
        self.seq_len, self.image, self._padding = seq_len, image, padding
        given = ((picture.where, (picture, tokens)) for picture, tokens in zip(pictures, told, strict=True))
        kept = list(good(given, lambda _, both: (both[0], self._row(*both)), skipped or Skipped()))
        self.pictures, self._rows = [picture for picture, _ in kept], [row for _, row in kept]

    @property
    def vocab_size(self) -> int:
        """All ids are below it."""
        return 1 + max((int(ids.max()) for ids, _ in self._rows), default=0)

    def gather(self, rows: Sequence[int], draws: Sequence[Draw]) -> dict[str, Tensor]:
        """``pixel_values`` [rows, channels, height, width]; ``input_ids`` and ``labels`` int64 [rows, seq_len]."""
        ids = np.full((len(rows), self.seq_len), self._padding)
        labels = np.full((len(rows), self.seq_len), IGNORED_LABEL)
        for nth, row in enumerate(rows):
            whole, learnt = self._rows[row]
            ids[nth, : len(whole) - 1] = whole[:-1]
            labels[nth, : len(whole) - 1] = np.where(learnt[1:], whole[1:], IGNORED_LABEL)
        named = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        return {**self._seen(rows, draws, named["input_ids"]), **named}

    def _lengths(self, picture: Picture) -> list[int]:
        """How many tokens each image of ``picture`` takes.  Raises BadRecord."""
        if picture.more:
            raise BadRecord(f"has {1 + len(picture.more)} images, but this model takes one a text; give one")
        return [self.image.count]

    def _seen(self, rows: Sequence[int], draws: Sequence[Draw], ids: Tensor) -> dict[str, Tensor]:
        """The images of ``rows``, whose tokens are ``ids``."""
        return {"pixel_values": self.pixels(rows, draws)}

    def _row(self, picture: Picture, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids with the images' among them, and which are learnt.  Raises BadRecord."""
        ids, learnt, lengths = ids_of(tokens).astype(np.int64), tokens & UNLEARNT == 0, self._lengths(picture)
        if not (ids == self.image.token).any():
            first = np.array([*self.image.before, self.image.token, *self.image.after] * len(lengths))
            ids, learnt = np.concatenate((first, ids)), np.concatenate((np.zeros(len(first), bool), learnt))
        named = ids == self.image.token
        if (problem := _misnamed(named, len(lengths))) is not None:
            raise BadRecord(problem)
        times = np.ones(len(ids), np.int64)
        times[named] = lengths
        ids, learnt = np.repeat(ids, times), np.repeat(learnt & ~named, times)
        if len(ids) > self.seq_len + 1:  # a row's last token is nothing's input
            whose = "image's" if len(lengths) == 1 else "images'"
            raise BadRecord(
                f"has {len(ids)} tokens, {sum(lengths)} of them its {whose}, of which a row of "
                f"seq_len={self.seq_len} has no place for all; raise seq_len"
            )
        return ids, learnt


def _misnamed(named: np.ndarray, images: int) -> str | None:
    """What is wrong with where a text names its images."""
    if (count := int(named.sum())) != images:
        return f"names {count} images, but a sample has {'one' if images == 1 else images}; mend that text"
    if named[-1]:
        return "ends with an image, of which a model learns nothing; let its text go on from it"
    if (named[1:] & named[:-1]).any():
        return "names two images with no token between them; put the model's own around each"
    return None


class ToldGrids(ToldImages):
    """The same with one or more images a text, of any size (Qwen-VL): patches of all, and a grid of each."""

    def _lengths(self, picture: Picture) -> list[int]:
        patches, square = self.processor.get_number_of_image_patches, self.processor.merge_size**2
        try:
            return [patches(high, wide, {}) // square for wide, high in picture.sizes()]
        except ValueError as error:  # too long for their width
            raise BadRecord(f"has an image that the processor refuses ({error}); mend or remove it") from None

    def _seen(self, rows: Sequence[int], draws: Sequence[Draw], ids: Tensor) -> dict[str, Tensor]:
        """``pixel_values`` float32 [patches, ...], ``image_grid_thw`` int64 [images, 3] and ``mm_token_type_ids``.

        The last is 1 where one of ``ids`` stands for an image.
        """
        images = [image for row in rows for image in self.pictures[row].open_all()]
        made = self.processor(images=images, return_tensors="pt")
        kinds = (ids == self.image.token).long()
        grids: Tensor = made["image_grid_thw"]
        return {"pixel_values": made["pixel_values"].float(), "image_grid_thw": grids, "mm_token_type_ids": kinds}
