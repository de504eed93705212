"""What reads a model's inputs, of transformers: tokenizers and processors, for a run and beside its exports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galvatron.core.errors import DataError
from galvatron.core.job import DataSection
from galvatron.core.tasks import WITH_MEDIA, Task

from .tokenizer import load_tokenizer


@dataclass(frozen=True)
class Processing:
    """Several that are saved into one directory, the later over the earlier ones."""

    parts: tuple[Any, ...]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write them as ``from_pretrained`` of AutoProcessor, AutoImageProcessor and AutoTokenizer takes them."""
        for part in self.parts:
            part.save_pretrained(directory)


def processing_of(data: DataSection, task: Task) -> Processing:
    """What read the inputs of a model trained for ``task``.  Raises DataError if it does not load."""
    parts = []
    if task in WITH_MEDIA:
        parts.append(_whole(data) or (load_extractor if task == "speech_to_text" else load_processor)(data))
    if task != "image_classification":
        parts.append(load_tokenizer(data.tokenizer, data.chat_template).for_transformers())
    return Processing(tuple(parts))


def load_processor(data: DataSection) -> Any:
    """The image processor of a job.  Raises DataError if there is none that loads."""
    from transformers import AutoImageProcessor

    return _loaded(data, AutoImageProcessor, "image processor")


def load_extractor(data: DataSection) -> Any:
    """The feature extractor of a job, which hears sounds.  Raises DataError if there is none that loads."""
    from transformers import AutoFeatureExtractor

    return _loaded(data, AutoFeatureExtractor, "feature extractor")


def _whole(data: DataSection) -> Any:
    """The processor of several inputs that ``data.processor`` is, if it is one."""
    from transformers import AutoProcessor, ProcessorMixin

    try:
        found = AutoProcessor.from_pretrained(data.processor)
    except Exception:  # of the library's many kinds: a tokenizer is not there, or its videos need what is not installed
        return None
    return found if isinstance(found, ProcessorMixin) else None  # in many directories it takes the tokenizer alone


def _loaded(data: DataSection, kind: Any, called: str) -> Any:
    if data.processor is None:
        raise DataError("images and sounds need a processor; set data.processor to the model's directory or hub name")
    try:
        # before 5.23 the mere name asks for torchvision
        return kind.from_pretrained(data.processor)
    except Exception as error:  # the library raises many kinds; each means that there is no such processor
        reason = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        raise DataError(f"data.processor={data.processor!r} is no {called} that loads ({reason}); give one") from None
