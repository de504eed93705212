"""Speech to text: sounds through a Hugging Face feature extractor, and what a decoder is to say of each.

Takes .wav files of whole numbers and one channel; gives log-mel features as Whisper's encoder hears them, and ids.
"""

from __future__ import annotations

import wave
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from galvatron.core.errors import DataError

from ..text import BadRecord, Skipped, good
from .answered import to_be_said
from .media import Medium

_WHOLE = {1: "u1", 2: "<i2", 4: "<i4"}
"""By their bytes; of those of one zero is 128, as .wav has it."""


@dataclass(frozen=True, slots=True)
class Sound(Medium):
    """A sound."""

    NAME: ClassVar[str] = "sound"
    ENDINGS: ClassVar[tuple[str, ...]] = (".wav",)

    def open(self, per_s: int) -> np.ndarray:
        """float32 [samples] from -1 to 1, ``per_s`` a second.

        Raises:
            DataError: it is no .wav of whole numbers, or has more than one channel or another rate.
        """
        try:
            with wave.open(BytesIO(self.read())) as file:
                channels, width, rate, count = file.getparams()[:4]
                held = file.readframes(count)
        except (wave.Error, EOFError, OSError, ValueError) as error:
            raise DataError(
                f"{self.where} is no .wav of whole numbers that can be read ({error}); {_converted(per_s)}"
            ) from None
        if (channels, rate) != (1, per_s):
            raise DataError(
                f"{self.where} has {channels} channels of {rate} samples a second, where the processor hears one of "
                f"{per_s}; {_converted(per_s)}"
            )
        if len(held) != count * width:
            raise DataError(f"{self.where} is cut off after {len(held) // width} of {count} samples; mend or remove it")
        return _numbers(held, width)


def _converted(per_s: int) -> str:
    return f"convert it (ffmpeg -i FILE -ac 1 -ar {per_s} -c:a pcm_s16le NEW.wav)"


def _numbers(held: bytes, width: int) -> np.ndarray:
    if width == 3:  # which numpy has not: a zero byte below each
        bytes_of = np.frombuffer(held, np.uint8).reshape(-1, 3)
        held, width = np.pad(bytes_of, ((0, 0), (1, 0))).tobytes(), 4
    numbers = np.frombuffer(held, _WHOLE[width]).astype(np.float64) - (128 if width == 1 else 0)
    return (numbers / 2 ** (8 * width - 1)).astype(np.float32)


class Ear:
    """Sounds as a model hears them, by ``extractor`` (Whisper's, of ``transformers``).

    Raises:
        DataError: it is none that gives sounds features of one shape, or adds noise, which would differ from plan to
            plan.
    """

    def __init__(self, extractor: Any) -> None:
        self.per_s = int(getattr(extractor, "sampling_rate", 0))
        self.most = int(getattr(extractor, "n_samples", 0))
        if not (self.per_s and self.most) or getattr(extractor, "dither", False):
            raise DataError(
                f"{type(extractor).__name__} must have sampling_rate, n_samples and no dither, as Whisper's has; give "
                "data.processor another one"
            )
        self._extractor = extractor

    def samples(self, sound: Sound) -> np.ndarray:
        """float32 [samples].  Raises DataError if it cannot be heard, or not to its end."""
        samples = sound.open(self.per_s)
        if not 0 < len(samples) <= self.most:
            raise DataError(
                f"{sound.where} lasts {len(samples) / self.per_s:.2f} s, of which the processor takes more than none "
                f"and at most {self.most / self.per_s:g}; cut it or leave it out"
            )
        return samples

    def features(self, sounds: Sequence[Sound]) -> Tensor:
        """float32 [sounds, bins, frames]."""
        heard = [self.samples(sound) for sound in sounds]
        made: Tensor = self._extractor(heard, sampling_rate=self.per_s, return_tensors="pt")["input_features"]
        return made.float()


class ToldSounds:
    """``sounds`` as ``ear`` has them, and the ``told`` ids of the text of each, which end with an end of text.

    A decoder begins with ``start``; texts are filled up with ``padding``, which is not learnt.  ``skipped`` is told of
    those that it allows to leave out.

    Raises:
        DataError: a text is longer than ``seq_len``.
    """

    labelled = True

    def __init__(
        self,
        sounds: Sequence[Sound],
        told: Sequence[list[int]],
        ear: Ear,
        seq_len: int,
        *,
        start: int,
        padding: int,
        skipped: Skipped | None = None,
    ) -> None:
        def kept(_: str, both: tuple[Sound, list[int]]) -> tuple[Sound, list[int]]:
            sound, ids = both
            said = ids[1:] if ids[:1] == [start] else ids  # many tokenizers begin with what a decoder begins with
            if len(said) > seq_len:
                raise BadRecord(
                    f"has a text of {len(said)} tokens, for all of which a row of seq_len={seq_len} has no place; "
                    "raise seq_len or cut sound and text"
                )
            return sound, said

        given = ((sound.where, both) for sound, both in zip(sounds, zip(sounds, told, strict=True), strict=True))
        found = list(good(given, kept, skipped or Skipped()))
        self.sounds, self._told = [sound for sound, _ in found], [ids for _, ids in found]
        self.ear, self.seq_len, self._start, self._padding = ear, seq_len, start, padding

    def __len__(self) -> int:
        return len(self.sounds)

    @property
    def vocab_size(self) -> int:
        """All ids are below it."""
        return 1 + max((max(ids) for ids in self._told), default=0)

    def need(self, rows: int) -> str:
        """What ``rows`` samples take, and what there is, in words."""
        return f"{rows} sounds but the source has {len(self)}"

    def gather(self, rows: Sequence[int], draws: Sequence[object]) -> dict[str, Tensor]:
        """``input_features`` [rows, bins, frames]; ``decoder_input_ids`` and ``labels`` int64 [rows, seq_len]."""
        told = [self._told[row] for row in rows]
        said = to_be_said(told, self.seq_len, start=self._start, padding=self._padding)
        return {"input_features": self.ear.features([self.sounds[row] for row in rows]), **said}
