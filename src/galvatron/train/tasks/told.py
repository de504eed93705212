"""Vision and language: an image and a text that goes on from it, a row each, of which answers alone are learnt.

Where the text names its image there are as many tokens in its place as the model makes of it.  Rows are padded behind
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
    """The token that stands for a part of an image, and of how many parts a model makes one."""

    token: int
    count: int


class ToldImages(Images):
    """``pictures`` and the ``told`` tokens of the text of each, with what is said of them (``tokens``).

    A text that does not name its image begins with it.  Rows are filled up with ``padding``.  ``skipped`` is told of
    texts that it allows to leave out.

    Raises:
        DataError: a text names several images, or is longer than ``seq_len`` with its own.
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
        self.seq_len, self.image, self._padding = seq_len, image, padding
        given = (
            (picture.where, both) for picture, both in zip(pictures, zip(pictures, told, strict=True), strict=True)
        )
        kept = list(good(given, lambda _, both: (both[0], self._row(both[1])), skipped or Skipped()))
        super().__init__([picture for picture, _ in kept], processor, augmentation)
        self._rows = [row for _, row in kept]

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
        return {"pixel_values": self.pixels(rows, draws), **named}

    def _row(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids with the image's among them, and which are learnt."""
        ids, learnt = ids_of(tokens).astype(np.int64), tokens & UNLEARNT == 0
        places = np.flatnonzero(ids == self.image.token).tolist()
        if len(places) > 1:
            raise BadRecord(f"names {len(places)} images, but a sample has one; mend that text")
        before, after = (places[0], places[0] + 1) if places else (0, 0)
        parts = np.full(self.image.count, self.image.token)
        ids = np.concatenate((ids[:before], parts, ids[after:]))
        if len(ids) > self.seq_len + 1:  # a row's last token is nothing's input
            raise BadRecord(
                f"has {len(ids)} tokens, {len(parts)} of them its image's, of which a row of "
                f"seq_len={self.seq_len} has no place for all; raise seq_len"
            )
        return ids, np.concatenate((learnt[:before], np.zeros(len(parts), bool), learnt[after:]))
