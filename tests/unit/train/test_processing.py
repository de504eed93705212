"""What reads a model's inputs stands beside its export, from whichever directories a job takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from galvatron.core.errors import DataError
from galvatron.core.job import DataSection
from galvatron.core.tasks import Task
from galvatron.testing.models import tiny_config
from galvatron.train import processing_of
from processors import OF_IMAGES

READERS: dict[str, Any] = {
    "vit": ViTImageProcessorPil(size={"height": 16, "width": 16}),
    "clip": CLIPImageProcessorPil(crop_size=16),
    "llava": CLIPImageProcessorPil(crop_size=16),
    "qwen2_vl": Qwen2VLImageProcessorPil(patch_size=2),
    "whisper": WhisperFeatureExtractor(feature_size=8),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    names = ("</s>", "?", "<image>", "<|image_pad|>", "<|video_pad|>", "w0")
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


pytestmark = OF_IMAGES


@pytest.mark.parametrize(
    ("name", "task", "has_config", "has_words"),
    [
        ("vit", "image_classification", True, True),
        ("clip", "contrast", False, True),
        ("llava", "vision_language", False, True),
        ("llava", "vision_language", True, False),
        ("qwen2_vl", "vision_language", False, True),
        ("whisper", "speech_to_text", False, True),
    ],
)
def test_what_a_job_reads_with_is_exported_from_a_directory_that_names_no_processor(
    name: str, task: Task, has_config: bool, has_words: bool, tmp_path: Path, tokenizer: Any
) -> None:
    """In such a directory transformers' AutoProcessor finds the tokenizer alone, or nothing."""
    tokenizer.save_pretrained(tmp_path / "words")
    beside = [READERS[name], *[tiny_config(name)] * has_config, *[tokenizer] * has_words]
    for part in beside:
        part.save_pretrained(tmp_path / "reads")
    data = DataSection(source="", processor=str(tmp_path / "reads"), tokenizer=str(tmp_path / "words"))
    processing_of(data, task).save_pretrained(tmp_path / "out")
    auto = AutoFeatureExtractor if name == "whisper" else AutoImageProcessor
    assert auto.from_pretrained(tmp_path / "out").to_dict() == auto.from_pretrained(tmp_path / "reads").to_dict()
    if task != "image_classification":
        assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def test_a_processor_of_several_inputs_is_exported_whole(tmp_path: Path, tokenizer: Any) -> None:
    """With what it says of itself, and the job's tokenizer."""
    other = Tokenizer(models.WordLevel({"x": 0, "?": 1, "<image>": 2}, unk_token="?"))
    own = PreTrainedTokenizerFast(tokenizer_object=other, eos_token="x")
    LlavaProcessor(READERS["llava"], own, patch_size=8, num_additional_image_tokens=1).save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "words")
    data = DataSection(source="", processor=str(tmp_path / "a"), tokenizer=str(tmp_path / "words"))
    processing_of(data, "vision_language").save_pretrained(tmp_path / "out")
    found = AutoProcessor.from_pretrained(tmp_path / "out")
    assert (type(found), found.patch_size, found.num_additional_image_tokens) == (LlavaProcessor, 8, 1)
    assert found.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_a_directory_that_reads_nothing_is_one_sentence(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path)
    data = DataSection(source="", processor=str(tmp_path), tokenizer=str(tmp_path))
    with pytest.raises(DataError, match=r"is no image processor that loads .*; give one"):
        processing_of(data, "vision_language")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match=r"is no feature extractor that loads .*; give one"):
        processing_of(data, "speech_to_text")
