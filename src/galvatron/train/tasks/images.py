"""Image classification and pairs of image and text: pictures through a Hugging Face image processor.

Takes pictures; gives pixels and what belongs to them.  What is cropped and turned depends on a sample's draw alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from galvatron.core.errors import DataError

from .classes import Numbering, classes_of, cut_off, padded
from .media import Medium

if TYPE_CHECKING:
    from ..data import Draw


@dataclass(frozen=True, slots=True)
class Picture(Medium):
    """An image, or several of one text."""

    NAME: ClassVar[str] = "image"
    ENDINGS: ClassVar[tuple[str, ...]] = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

    def check(self) -> None:
        """Read the head of each.  Raises DataError if one is no image."""
        self._look(lambda image: image.verify())

    def open(self) -> Any:
        """The image, or the first, in RGB.  Raises DataError if it cannot be read."""
        return self.open_all()[0]

    def open_all(self) -> list[Any]:
        """All in RGB.  Raises DataError if one cannot be read."""
        return self._look(_in_colour)

    def sizes(self) -> list[tuple[int, int]]:
        """How wide and high each is, in pixels.  Raises DataError if one cannot be read."""
        return self._look(lambda image: image.size)

    def _look(self, see: Callable[[Any], Any]) -> list[Any]:
        from PIL import Image

        try:
            return [see(Image.open(BytesIO(read()))) for read in (self.read, *self.more)]
        except Exception as error:  # decoders raise what they like
            raise DataError(f"{self.where} is no image that can be read ({error}); mend or remove it") from None


def _in_colour(image: Any) -> Any:
    """``image``, of PIL, in RGB: of 16 bits a pixel the upper eight, which PIL itself takes where there are colours."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode}, whose white is not known; make them 8 or 16 bits")
    if "transparency" in image.info:
        image = image.convert("RGBA")  # what PIL advises for palettes
    return image.convert("RGB")


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is done to an image that is trained on, never to one that is evaluated on.

    Attributes:
        least_area: of the image that a crop takes, whose sides are from 3:4 to 4:3 (Szegedy et al. 2015); 1 crops none.
        flip: whether every other one is turned left to right.
    """

    least_area: float = 0.08
    flip: bool = True

    def of(self, image: Any, random: np.random.RandomState) -> Any:
        """``image``, of PIL, cropped and turned as ``random`` says."""
        area, ratio, x, y, turn = random.random_sample(5)
        if self.least_area < 1:
            image = image.crop(self._box(image.size, area, ratio, x, y))
        return image.transpose(0) if self.flip and turn < 0.5 else image  # 0: PIL's FLIP_LEFT_RIGHT

    def _box(self, size: tuple[int, int], area: float, ratio: float, x: float, y: float) -> tuple[int, int, int, int]:
        wide, high = size
        taken = wide * high * (self.least_area + area * (1 - self.least_area))
        side = math.exp((2 * ratio - 1) * math.log(4 / 3))  # as many wide as high ones
        width, height = (
            min(wide, max(1, round(math.sqrt(taken * side)))),
            min(high, max(1, round(math.sqrt(taken / side)))),
        )
        left, top = round(x * (wide - width)), round(y * (high - height))
        return left, top, left + width, top + height


class Images:
    """``pictures`` through ``processor`` (an image processor of ``transformers``)."""

    def __init__(self, pictures: Sequence[Picture], processor: Any, augmentation: Augmentation | None) -> None:
        self.pictures, self.processor, self.augmentation = pictures, processor, augmentation

    def __len__(self) -> int:
        return len(self.pictures)

    def need(self, rows: int) -> str:
        """What ``rows`` samples take, and what there is, in words."""
        return f"{rows} images but the source has {len(self)}"

    def pixels(self, rows: Sequence[int], draws: Sequence[Draw]) -> Tensor:
        """float32 [rows, channels, height, width]."""
        images = [self._image(row, draw) for row, draw in zip(rows, draws, strict=True)]
        made: Tensor = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return made.float()

    def _image(self, row: int, draw: Draw) -> Any:
        image = self.pictures[row].open()
        if self.augmentation is None or not draw.trains:
            return image
        return self.augmentation.of(image, draw.generator())


class LabelledImages(Images):
    """Images and the classes they are of.

    Raises:
        DataError: a picture has no class, or one that ``number`` leaves out.
    """

    labelled = True

    def __init__(
        self,
        pictures: Sequence[Picture],
        processor: Any,
        augmentation: Augmentation | None = None,
        number: Numbering = classes_of,
    ) -> None:
        super().__init__(pictures, processor, augmentation)
        labels = [picture.label for picture in pictures if picture.label is not None]
        self.classes = number(labels)
        for picture in pictures:
            if picture.label not in self.classes:
                raise DataError(
                    f"{picture.where} must be of one of the {len(self.classes)} classes, got {picture.label!r}; mend "
                    "it, or put it into the folder of its class"
                )
        self._labels = torch.tensor([self.classes[label] for label in labels])

    def gather(self, rows: Sequence[int], draws: Sequence[Draw]) -> dict[str, Tensor]:
        """``pixel_values`` float32 [rows, channels, height, width] and ``labels`` int64 [rows]."""
        return {"pixel_values": self.pixels(rows, draws), "labels": self._labels[list(rows)]}


class TitledImages(Images):
    """Images and the texts that belong to them, for contrast: every other pair of the whole batch is a wrong one.

    All ids are at most ``highest``.

    Raises:
        DataError: a picture has no text, or the ``tokenizer`` (of ``transformers``) no padding token.
    """

    labelled = False

    def __init__(
        self,
        pictures: Sequence[Picture],
        processor: Any,
        tokenizer: Any,
        seq_len: int,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(pictures, processor, augmentation)
        if tokenizer.pad_token_id is None:
            raise DataError(
                "pairs of image and text need a tokenizer with a padding token; set one (often its eos token)"
            )
        texts = [_text_of(picture) for picture in pictures]
        self.seq_len, self._pad = seq_len, tokenizer.pad_token_id
        self._ids = cut_off(texts, tokenizer, seq_len)
        self._is_masked = "attention_mask" in tokenizer.model_input_names
        self.highest = max((max(ids, default=0) for ids in self._ids), default=0)

    def gather(self, rows: Sequence[int], draws: Sequence[Draw]) -> dict[str, Tensor]:
        """``pixel_values`` [rows, channels, height, width]; ``input_ids`` and ``attention_mask`` [rows, seq_len].

        No mask where the tokenizer's models take none (SigLIP's, which see padding like words).
        """
        ids, mask = padded([self._ids[row] for row in rows], self.seq_len, self._pad)
        masks = {"attention_mask": mask} if self._is_masked else {}
        return {"pixel_values": self.pixels(rows, draws), "input_ids": ids, **masks}


def _text_of(picture: Picture) -> str:
    if picture.text is None:
        raise DataError(f"{picture.where} must have a text; say which field it is in, or mend it")
    return picture.text
