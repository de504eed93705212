"""The samples of every task: what their record says, right, and the same whenever they are asked for."""

from __future__ import annotations

import io
import json
import re
import tarfile
import wave
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from galvatron.core.errors import DataError
from galvatron.core.job import DataSection, TrainSection
from galvatron.models.grids import Grids
from galvatron.models.tasks import for_task
from galvatron.testing.models import tiny_config
from galvatron.train.data import IGNORED_LABEL, Dataset, Draw, Samples
from galvatron.train.load import load_dataset, prepare_source
from galvatron.train.tasks import (
    INPUTS,
    AnsweredTexts,
    Augmentation,
    Ear,
    ImageTokens,
    LabelledImages,
    LabelledTexts,
    MaskedRows,
    Picture,
    Sound,
    SpanRows,
    TitledImages,
    ToldGrids,
    ToldImages,
    ToldSounds,
)
from galvatron.train.tasks.classes import classes_of, named_classes
from galvatron.train.tasks.media import Fields
from galvatron.train.tasks.spans import lengths_of
from galvatron.train.text import reader
from galvatron.train.tokenizer import HuggingFaceTokenizer
from galvatron.train.tokens import UNLEARNT
from processors import OF_IMAGES

WORDS, SENTINELS, RATE = 200, 100, 16000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import pre_tokenizers

    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "</s>", "?", *(f"<extra_id_{i}>" for i in range(SENTINELS))]
    vocabulary = {name: i for i, name in enumerate([*names, *(f"w{i}" for i in range(WORDS))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        eos_token="</s>",
    )  # fmt: skip


@pytest.fixture(scope="module")
def processor() -> Any:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 16, "width": 16})


def png(color: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> bytes:
    image, file = Image.new("RGB", size, color), io.BytesIO()
    image.putpixel((0, 0), (255, 255, 255))
    for x in range(size[0]):
        image.putpixel((x, 0), (x % 256, 0, 0))  # so that left and right differ
    image.save(file, "PNG")
    return file.getvalue()


COLORS = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]
NAMES = ["red", "green", "blue"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(9):
        path = tmp_path / "images" / NAMES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(COLORS[number % 3]))
    return tmp_path / "images"


def wav(samples: bytes, *, width: int = 2, rate: int = RATE, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setparams((channels, width, rate, 0, "NONE", ""))
        written.writeframes(samples)
    return file.getvalue()


def ramp(count: int) -> bytes:
    return (np.arange(count) * 100).astype("<i2").tobytes()


def sound_of(samples: bytes, **said: int) -> Sound:
    return Sound("a.wav", lambda: wav(samples, **said))


def ear() -> Ear:
    """Of one second: 8 bins of 50 frames."""
    return Ear(WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, hop_length=320, chunk_length=1, n_fft=1024))


def told_sounds() -> ToldSounds:
    sounds, told = [sound_of(ramp(100 + n)) for n in range(9)], [[7, n, 4] for n in range(9)]
    return ToldSounds(sounds, told, ear(), 4, start=7, padding=0)


def samples_of(name: str, tokenizer: Any, processor: Any, folder: Path) -> Samples:
    tokens = np.random.RandomState(0).randint(6 + SENTINELS, 6 + SENTINELS + WORDS, 4000)
    pictures = Picture.find(folder)
    if name == "pairs":
        answers = [[9, 10, 4], [11, 4]] * 6
        return AnsweredTexts([[7, 8, 4], [9, 4]] * 6, answers, 8, start=5, padding=0)
    if name == "masked_lm":
        return MaskedRows(tokens, 32, tokenizer)
    if name == "seq2seq_lm":
        return SpanRows(tokens, 32, tokenizer)
    if name == "text_classification":
        return LabelledTexts(["w1 w2 w3", "w4"] * 6, ["good", "bad"] * 6, 8, tokenizer)
    if name == "image_classification":
        return LabelledImages(pictures, processor, Augmentation())
    if name == "speech_to_text":
        return told_sounds()
    titled = [replace(picture, text=f"w{i} w{i}") for i, picture in enumerate(pictures)]
    if name == "vision_language":
        return ToldImages(titled, [np.arange(100, 105)] * 9, processor, 8, ImageTokens(6, 4), 4, Augmentation())
    return TitledImages(titled, processor, tokenizer, 8, Augmentation())


@pytest.mark.parametrize("name", [*(name for name in INPUTS if name != "causal_lm"), "pairs"])
def test_batches_are_what_the_record_says_and_depend_on_seed_and_index_alone(
    name: str, tokenizer: Any, processor: Any, folder: Path
) -> None:
    samples = samples_of(name, tokenizer, processor, folder)
    data = Dataset(samples, global_batch_size=4, seed=7, eval_fraction=0.2)
    batches = {step: data.batch(step) for step in (3, 0, 7, 3)}
    again = Dataset(samples, global_batch_size=2, seed=7, eval_fraction=0.2)
    for step, batch in batches.items():
        halves = [again.batch(2 * step), again.batch(2 * step + 1)]
        record = INPUTS["seq2seq_lm" if name == "pairs" else name]
        optional = record.optional if name in ("pairs", "contrast") else ()
        inputs = (*record.inputs, *optional)
        assert set(batch) == {given.name for given in inputs}
        for given in inputs:
            assert batch[given.name].dtype == given.dtype
            assert batch[given.name].dim() == len(given.shape)
            assert len(batch[given.name]) == 4
            assert torch.equal(batch[given.name], torch.cat([half[given.name] for half in halves]))
    other = Dataset(samples, global_batch_size=4, seed=8, eval_fraction=0.2)
    assert any(not torch.equal(other.batch(0)[key], value) for key, value in batches[0].items())
    first, second = data.eval_batch(0), data.eval_batch(0)
    assert all(torch.equal(first[key], second[key]) for key in first) if data.num_eval_batches else not samples.labelled


def test_bert_masks_fifteen_percent_and_of_these_eighty_ten_ten(tokenizer: Any) -> None:
    tokens = np.random.RandomState(0).randint(6 + SENTINELS, 6 + SENTINELS + WORDS, 60_000)
    data = Dataset(MaskedRows(tokens, 128, tokenizer), global_batch_size=400)
    ids, labels = data.batch(0).values()
    chosen = labels != IGNORED_LABEL
    count = int(chosen.sum())
    assert count / (chosen.numel() - 2 * 400) == pytest.approx(0.15, abs=0.004)
    masked = chosen & (ids == tokenizer.mask_token_id)
    stays = chosen & (ids == labels)
    assert int(masked.sum()) / count == pytest.approx(0.8, abs=0.015)
    assert int((chosen & ~masked & ~stays).sum()) / count == pytest.approx(0.1, abs=0.015)
    assert int(stays.sum()) / count == pytest.approx(0.1, abs=0.015)
    assert (ids[:, 0] == tokenizer.cls_token_id).all()
    assert (ids[:, -1] == tokenizer.sep_token_id).all()
    assert not chosen[:, [0, -1]].any()
    whole = {tuple(row) for row in torch.where(chosen, labels, ids)[:, 1:-1].tolist()}
    assert whole <= {tuple(tokens[i : i + 126].tolist()) for i in range(0, 60_000 - 126, 126)}
    assert not torch.equal(labels, data.batch(1)["labels"])  # another epoch hides other tokens
    assert chosen.any(dim=1).all()


def test_spans_give_back_the_text_they_were_cut_from(tokenizer: Any) -> None:
    tokens = np.random.RandomState(0).randint(6 + SENTINELS, 6 + SENTINELS + WORDS, 4000)
    rows = SpanRows(tokens, 64, tokenizer)
    data = Dataset(rows, global_batch_size=len(rows))
    batch = data.batch(0)
    assert batch["input_ids"].shape == (len(rows), 64)
    assert batch["labels"].shape == batch["decoder_input_ids"].shape == (len(rows), rows.target_len)
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["labels"][:, :-1])
    assert (batch["decoder_input_ids"][:, 0] == tokenizer.pad_token_id).all()
    wide = Dataset(SpanRows(tokens, 64, tokenizer, target_len=64), global_batch_size=len(rows)).batch(0)
    assert torch.equal(wide["labels"][:, : rows.target_len], batch["labels"])
    assert (wide["labels"][:, rows.target_len :] == IGNORED_LABEL).all()
    assert (wide["decoder_input_ids"] >= 0).all()
    sentinels = range(6, 6 + SENTINELS)
    found = set()
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert ids[-1] == labels[-1] == tokenizer.eos_token_id
        spans: dict[int, list[int]] = {}
        for token in labels[:-1]:
            if token in sentinels:
                spans[token] = []
            else:
                spans[list(spans)[-1]].append(token)
        assert list(spans) == list(sentinels)[: len(spans)]
        assert [token for token in ids if token in sentinels] == list(spans)
        found.add(tuple(part for token in ids[:-1] for part in spans.get(token, [token])))
    assert found == {tuple(tokens[i * rows.raw : (i + 1) * rows.raw].tolist()) for i in range(len(rows))}
    assert sum(labels.count(6) for labels in batch["labels"].tolist()) == len(rows)


def test_every_length_of_inputs_can_be_made() -> None:
    assert {lengths_of(raw)[2] for raw in range(2, 700)} >= set(range(4, 600))
    assert lengths_of(568) == (85, 28, 512)  # T5's own: 568 tokens make 512, and 114 targets


def test_too_few_sentinels_or_no_mask_is_said(tokenizer: Any) -> None:
    from galvatron.train.tokenizer import ByteTokenizer

    tokens, plain = np.zeros(9000, np.int64), ByteTokenizer().for_transformers()
    with pytest.raises(DataError, match="have 114 spans, but the tokenizer lacks <extra_id_100>; give T5's"):
        SpanRows(tokens, 2048, tokenizer)
    with pytest.raises(DataError, match="needs a tokenizer with a mask token"):
        MaskedRows(tokens, 32, plain)


def test_texts_of_classes_are_padded_and_classes_numbered_by_name(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"text": "w0 w1 w2 w3", "label": "b"}, {"text": "w4", "label": "a"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = LabelledTexts.read(DataSection(source=str(path)), 3, tokenizer)
    batch = texts.gather([0, 1], [])
    first = tokenizer.convert_tokens_to_ids("w0")
    assert batch["input_ids"].tolist() == [[first, first + 1, first + 2], [first + 4, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert (texts.classes, batch["labels"].tolist()) == ({"a": 0, "b": 1}, [1, 0])
    with pytest.raises(DataError, match="'b' is none of the 1 classes trained on"):
        LabelledTexts.read(DataSection(source=str(path)), 3, tokenizer, number=lambda _: {"a": 0})
    path.write_text('{"text": "w0", "label": 1}\n{"text": "w0", "label": 1.5}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2 must have a class, name or number, in field 'label', got 1\.5"):
        LabelledTexts.read(DataSection(source=str(path)), 3, tokenizer)
    with pytest.raises(
        DataError, match=r"a\.jsonl:1 has no field 'kind' for its class, its fields: 'label', 'text'; set"
    ):
        LabelledTexts.read(DataSection(source=str(path)), 3, tokenizer, label_field="kind")


def test_a_row_without_a_place_for_special_tokens_is_refused(processor: Any, folder: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    words.post_processor = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 1)])
    framed = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a", bos_token="<s>")
    with pytest.raises(DataError, match="seq_len=1 must be more than the 2 tokens that a text has around it; raise it"):
        LabelledTexts(["a", "a"], [0, 1], 1, framed)
    titled = [replace(picture, text="a") for picture in Picture.find(folder)]
    with pytest.raises(DataError, match="seq_len=1 must be more than the 2 tokens"):
        TitledImages(titled, processor, framed, 1)


def test_classes_have_the_numbers_that_the_model_has_for_them() -> None:
    unnamed, named = ("LABEL_0", "LABEL_1", "LABEL_2"), ("no", "maybe", "yes")
    assert classes_of(["no", "yes"], named) == {"no": 0, "maybe": 1, "yes": 2}
    assert classes_of([2, 0], unnamed) == {0: 0, 1: 1, 2: 2}
    assert named_classes(classes_of([2, 0], named), named) == named
    assert named_classes(classes_of([5, 1, 3], unnamed), unnamed) == ("1", "3", "5")
    assert named_classes(classes_of(["b", "a"], unnamed), unnamed) == ("a", "b", "LABEL_2")
    assert named_classes(classes_of(["c", "b", "a"], named), named) == ("a", "b", "c")  # all of them others
    for labels in (["no", "perhaps"], ["perhaps"]):
        with pytest.raises(DataError, match="class 'perhaps' is none of the 3 that the model's config names"):
            classes_of(labels, named)


def make_sources(folder: Path, images: dict[str, bytes]) -> dict[str, Path]:
    """The same pictures as records with paths, as parquet with bytes and as a webdataset tar."""
    import pyarrow
    import pyarrow.parquet

    labels = [name.split("/")[0] for name in images]
    rows = [
        {"image": name, "label": label, "text": f"w{i}"}
        for i, (name, label) in enumerate(zip(images, labels, strict=True))
    ]
    (folder / "paths.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [{**row, "image": {"bytes": images[row["image"]], "path": None}} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(held), folder / "held.parquet")
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for i, row in enumerate(rows):
            fields = json.dumps({"label": row["label"]}).encode()
            for ending, content in (("png", images[row["image"]]), ("json", fields), ("txt", row["text"].encode())):
                info = tarfile.TarInfo(f"{i:04d}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return {path.name: path for path in (folder / "paths.jsonl", folder / "held.parquet", folder / "shard.tar")}


@pytest.mark.parametrize("name", ["paths.jsonl", "held.parquet", "shard.tar"])
def test_pictures_are_the_same_from_every_source(name: str, folder: Path) -> None:
    plain = Picture.find(folder)
    images = {str(Path(picture.where).relative_to(folder)): picture.read() for picture in plain}
    source = make_sources(folder, images)[name]
    found = Picture.find(source)
    assert [(picture.label, picture.read()) for picture in found] == [(p.label, p.read()) for p in plain]
    titled = Picture.find(source, Fields(read=reader(DataSection(source=str(source)))))
    assert [picture.text for picture in titled] == [f"w{i}" for i in range(9)]
    for picture in found:
        picture.check()


def test_sounds_of_every_width_are_heard_alike() -> None:
    numbers = np.array([0, 64, -128, 127], np.int64)
    written = {
        1: (numbers + 128).astype("u1").tobytes(),
        2: (numbers << 8).astype("<i2").tobytes(),
        3: b"".join(int(number << 16).to_bytes(3, "little", signed=True) for number in numbers),
        4: (numbers << 24).astype("<i4").tobytes(),
    }
    for width, held in written.items():
        heard = sound_of(held, width=width).open(RATE)
        assert heard.dtype == np.float32
        assert heard.tolist() == [0, 0.5, -1, 127 / 128], width


def test_a_sound_is_what_whispers_extractor_makes_of_it_and_its_text_what_the_decoder_says() -> None:
    batch = told_sounds().gather([2, 5], [])
    raw = (np.arange(102) * 100 / 2**15).astype(np.float32)
    made = ear()._extractor(raw, sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert torch.equal(batch["input_features"][:1], made)
    assert made.shape == (1, 8, 50)
    assert batch["labels"].tolist() == [[2, 4, -100, -100], [5, 4, -100, -100]]  # without what a decoder begins with
    assert batch["decoder_input_ids"].tolist() == [[7, 2, 4, 0], [7, 5, 4, 0]]
    with pytest.raises(DataError, match=r"a\.wav has a text of 3 tokens, for all of which a row of seq_len=2"):
        ToldSounds([sound_of(ramp(9))], [[1, 2, 4]], ear(), 2, start=7, padding=0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            wav(ramp(10), rate=44100),
            r"has 1 channels of 44100 samples a second, .* one of 16000; convert it \(ffmpeg",
        ),
        (wav(ramp(10), channels=2), "has 2 channels of 16000 samples a second"),
        (b"RIFFno", r"is no \.wav of whole numbers that can be read"),
        (
            wav(ramp(10)).replace(b"fmt \x10\x00\x00\x00\x01", b"fmt \x10\x00\x00\x00\x03"),
            r"is no .* \(unknown format: 3\); convert it",
        ),
        (wav(ramp(10))[:-4], "is cut off after 8 of 10 samples"),
        (wav(b""), r"lasts 0\.00 s, of which the processor takes more than none and at most 1"),
        (wav(ramp(RATE + 1)), r"lasts 1\.00 s, of which"),
    ],
    ids=("rate", "channels", "none", "floats", "cut off", "empty", "long"),
)
def test_a_sound_that_cannot_be_heard_to_its_end_is_one_sentence(content: bytes, words: str) -> None:
    with pytest.raises(DataError, match=rf"a\.wav {words}"):
        ear().samples(Sound("a.wav", lambda: content))


def test_sounds_lie_beside_their_texts(tmp_path: Path) -> None:
    fields = Fields(read=reader(DataSection(source="")))
    (tmp_path / "b.wav").write_bytes(wav(ramp(10)))
    with pytest.raises(DataError, match=r"b\.wav must have its text beside it, in b\.txt; write one"):
        Sound.find(tmp_path, fields)
    (tmp_path / "b.txt").write_text("w1 w2\n")
    assert [(Path(sound.where).name, sound.text) for sound in Sound.find(tmp_path, fields)] == [("b.wav", "w1 w2")]


def test_an_extractor_that_adds_noise_is_refused() -> None:
    with pytest.raises(DataError, match="must have sampling_rate, n_samples and no dither"):
        Ear(WhisperFeatureExtractor(dither=0.1))


def test_an_image_is_cropped_and_turned_in_training_alone(folder: Path, processor: Any) -> None:
    plain, pictures = LabelledImages(Picture.find(folder), processor), Picture.find(folder)
    assert plain.classes == {"blue": 0, "green": 1, "red": 2}
    varied = LabelledImages(pictures, processor, Augmentation())
    flipped = LabelledImages(pictures, processor, Augmentation(least_area=1.0))
    of_each = [Dataset(samples, global_batch_size=3, eval_fraction=0.4) for samples in (plain, varied, flipped)]
    held = [data.eval_batch(0)["pixel_values"] for data in of_each]
    assert torch.equal(held[0], held[1])
    trained = [torch.cat([data.batch(step)["pixel_values"] for step in range(4)]) for data in of_each]
    assert not torch.equal(trained[0], trained[1])
    turned = [not torch.equal(ours, theirs) for ours, theirs in zip(trained[2], trained[0], strict=True)]
    mirrored = [torch.allclose(o.flip(-1), t, atol=0.02) for o, t in zip(trained[2], trained[0], strict=True)]
    assert 0 < sum(turned) < 12
    assert all(mirror for mirror, turn in zip(mirrored, turned, strict=True) if turn)


def test_crops_lie_within_the_image_and_have_the_area_that_was_drawn() -> None:
    augmentation = Augmentation(least_area=0.25)
    random = np.random.RandomState(1)
    shares = []
    for area, ratio, x, y in random.random_sample((300, 4)):
        left, top, right, bottom = augmentation._box((100, 100), area, ratio, x, y)
        assert 0 <= left < right <= 100
        assert 0 <= top < bottom <= 100
        shares.append((right - left) * (bottom - top) / 1e4)
    assert 0.24 < min(shares) < 0.3
    assert max(shares) > 0.9


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            b'{"image": "no.png", "label": 1}\n',
            r"a\.jsonl:1 must have a path from .* in field 'image', got 'no",
        ),
        ("a.parquet", b"PAR1 not really", r"a\.parquet cannot be read as parquet"),
        ("a.jsonl", b'{"image": "a.jsonl"}\n', r"a\.jsonl:1 has no field 'label' for its class"),
        ("a.tar", b"no tar" * 200, r"a\.tar is no plain tar"),
        ("a.txt", b"text", "has no images; give a directory of them, one folder a class"),
    ],
)
def test_a_bad_source_of_images_is_one_sentence(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        Picture.find(tmp_path / name)


SKIPPED: dict[str, dict[str, Any]] = {
    "text_classification": {"bad": {"text": "w1", "label": 1.5}, "words": "must have a class"},
    "pairs": {"bad": {"prompt": "w1", "completion": "w2 " * 20}, "words": "has a prompt or a completion of 21 tokens"},
    "image_classification": {"bad": {"image": "bad.png", "label": "a"}, "words": "is no image that can be read"},
    "contrast": {"bad": {"image": "no.png", "text": "w1"}, "words": "must have a path"},
    "vision_language": {"bad": {"image": "a.png", "text": "w1 " * 9}, "words": "has 19 tokens, 9 of them"},
    "speech_to_text": {"bad": {"audio": "bad.wav", "text": "w1"}, "words": "has 2 channels"},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=OF_IMAGES) if "image" in kind["bad"] else name for name, kind in SKIPPED.items()],
)
def test_a_bad_record_is_named_or_left_out_of_every_kind(
    name: str, tmp_path: Path, tokenizer: Any, processor: Any
) -> None:
    (tmp_path / "a.png").write_bytes(png(COLORS[0]))
    (tmp_path / "bad.png").write_bytes(b"\x89PNG but no")
    (tmp_path / "a.wav").write_bytes(wav(ramp(100)))
    (tmp_path / "bad.wav").write_bytes(wav(ramp(100), channels=2))
    good = {"text": "w1", "label": "a", "image": "a.png", "audio": "a.wav", "prompt": "w1", "completion": "w2"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (good, SKIPPED[name]["bad"], good)))
    tokenizer.save_pretrained(tmp_path / "words")
    reads = ear()._extractor if name == "speech_to_text" else processor
    reads.save_pretrained(tmp_path / "reads")
    variant = {"pairs": "t5", "text_classification": "bert", "image_classification": "vit", "contrast": "clip",
               "vision_language": "llava", "speech_to_text": "whisper"}[name]  # fmt: skip
    config = tiny_config(variant)
    if name == "text_classification":
        config = for_task(config, "text_classification")
    if name == "speech_to_text":
        config.num_mel_bins, config.max_source_positions = 8, 25
    if name == "pairs":
        config.decoder_start_token_id = 0
    for part in (config, config.get_text_config()):
        part.vocab_size = 1000
    strict = DataSection(
        source=str(tmp_path / "a.jsonl"),
        records="pairs" if name == "pairs" else "text",
        tokenizer=str(tmp_path / "words"),
        processor=str(tmp_path / "reads"),
        eval_fraction=0.0,
    )
    train = TrainSection(global_batch_size=2, seq_len=14, num_steps=1)
    task = "seq2seq_lm" if name == "pairs" else name
    with pytest.raises(DataError, match=rf"{SKIPPED[name]['words']}.*, or data\.skip_bad_records = true to leave such"):
        prepare_source(strict, train, tmp_path, task=task) and load_dataset(strict, train, tmp_path, config=config)
    lenient = strict.model_copy(update={"skip_bad_records": True})
    data = load_dataset(lenient, train, tmp_path, config=config)
    assert len(data.samples) == 2
    assert data.skipped.count == 1
    assert re.search(SKIPPED[name]["words"], data.skipped.first)
    assert len(data.batch(0)) > 1


def test_a_file_that_is_no_image_is_found_before_training(folder: Path) -> None:
    (folder / "red" / "9.png").write_bytes(b"\x89PNG but no")
    with pytest.raises(DataError, match=r"9\.png is no image that can be read"):
        next(picture for picture in Picture.find(folder) if "9.png" in picture.where).check()


def test_an_image_without_a_class_or_a_text_is_named(folder: Path, processor: Any, tokenizer: Any) -> None:
    (folder / "loose.png").write_bytes(png(COLORS[0]))
    with pytest.raises(DataError, match=r"loose\.png must be in the folder of its class, below .*; put it there, or"):
        Picture.find(folder)
    (folder / "loose.png").unlink()
    with pytest.raises(DataError, match=r"must have a text; say which field it is in"):
        TitledImages(Picture.find(folder), processor, tokenizer, 8)


def test_a_mask_of_padding_is_given_where_the_tokenizers_models_take_one(
    folder: Path, processor: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    titled = [replace(picture, text="w0 w1") for picture in Picture.find(folder)]
    batch = TitledImages(titled, processor, tokenizer, 4).gather([0], [Draw(0, 2, 0)])
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0]]
    assert batch["input_ids"][0, 2:].tolist() == [tokenizer.pad_token_id] * 2
    monkeypatch.setattr(tokenizer, "model_input_names", ["input_ids"])
    assert "attention_mask" not in TitledImages(titled, processor, tokenizer, 4).gather([0], [Draw(0, 2, 0)])


def test_an_image_stands_where_its_text_names_it_and_answers_alone_are_learnt(folder: Path, processor: Any) -> None:
    picture, *_ = Picture.find(folder)
    told = np.array([20, 6, 21, 22, 23], np.uint32)  # 6 names the image
    told[:3] |= UNLEARNT
    samples = ToldImages([picture], [told], processor, 9, ImageTokens(6, 3), padding=4)
    batch = samples.gather([0], [Draw(0, 2, 0)])
    assert batch["input_ids"].tolist() == [[20, 6, 6, 6, 21, 22, 4, 4, 4]]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, 22, 23, -100, -100, -100]]
    assert samples.vocab_size == 24
    unnamed = ToldImages([picture], [told[2:]], processor, 9, ImageTokens(6, 3), padding=4)
    assert unnamed.gather([0], [Draw(0, 2, 0)])["input_ids"].tolist() == [[6, 6, 6, 21, 22, 4, 4, 4, 4]]
    with pytest.raises(DataError, match=r"names 2 images, but a sample has one; mend that text"):
        ToldImages([picture], [np.array([6, 6])], processor, 9, ImageTokens(6, 3), padding=4)
    with pytest.raises(DataError, match=r"ends with an image, of which a model learns nothing; let its text go on"):
        ToldImages([picture], [told[:2]], processor, 9, ImageTokens(6, 3), padding=4)
    with pytest.raises(DataError, match=r"has 7 tokens, 3 of them its image's, of which a row of seq_len=5 has no"):
        ToldImages([picture], [told], processor, 5, ImageTokens(6, 3), padding=4)


def test_pairs_are_padded_on_both_sides_and_what_is_too_long_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    pairs = [{"prompt": "w0 w1 w2", "completion": "w3"}, {"prompt": "w4", "completion": "w5 w6"}]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = DataSection(source=str(path), records="pairs")
    samples = AnsweredTexts.read(data, 5, HuggingFaceTokenizer(tokenizer, "own"), start=7)
    first, end, said = tokenizer.convert_tokens_to_ids("w0"), tokenizer.eos_token_id, IGNORED_LABEL
    batch = samples.gather([0, 1], [])
    assert batch["input_ids"].tolist() == [[first, first + 1, first + 2, end, 0], [first + 4, end, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[first + 3, end, said, said, said], [first + 5, first + 6, end, said, said]]
    assert batch["decoder_input_ids"].tolist() == [[7, first + 3, end, 0, 0], [7, first + 5, first + 6, end, 0]]
    assert samples.vocab_size == first + 7
    with pytest.raises(DataError, match=r"a\.jsonl:1 has a prompt or a completion of 4 tokens, .* seq_len=3 has no"):
        AnsweredTexts.read(data, 3, HuggingFaceTokenizer(tokenizer, "own"), start=7)


@OF_IMAGES
def test_conversations_about_images_are_rendered_and_their_answers_learnt(
    folder: Path, tmp_path: Path, processor: Any, tokenizer: Any
) -> None:
    """By a template that names an image where a message has one; the model says how many tokens one is."""
    template = "{% for m in messages %}{% for p in m.content %}{{ '?' if p.type == 'image' else p.text }} {% endfor %}"
    (tmp_path / "chat.jinja").write_text(template + "{% endfor %}")
    asked = [{"type": "image"}, {"type": "text", "text": "w0"}]
    turns = [("user", asked), ("assistant", [{"type": "text", "text": "w1"}])]
    record = {"image": "red/0.png", "messages": [{"role": role, "content": content} for role, content in turns]}
    (folder / "a.jsonl").write_text(json.dumps(record) + "\n")
    tokenizer.save_pretrained(tmp_path / "processor")
    processor.save_pretrained(tmp_path / "processor")
    places = {name: str(tmp_path / "processor") for name in ("processor", "tokenizer")}
    data = DataSection(
        source=str(folder / "a.jsonl"),
        records="conversations",
        chat_template=str(tmp_path / "chat.jinja"),
        eval_fraction=0.0,
        **places,
    )
    image, first = tokenizer.convert_tokens_to_ids("?"), tokenizer.convert_tokens_to_ids("w0")
    config = tiny_config("llava", image_token_id=image, image_seq_length=3)
    train = TrainSection(global_batch_size=1, seq_len=6, num_steps=1)
    batch = load_dataset(data, train, tmp_path, config=config).batch(0)
    assert batch["input_ids"][0, :4].tolist() == [image, image, image, first]
    assert batch["labels"].tolist() == [[-100, -100, -100, first + 1, -100, -100]]
    titled = data.model_copy(update={"records": "pairs", "chat_template": None})
    with pytest.raises(DataError, match="contrast takes records=text"):
        load_dataset(titled, train, tmp_path, config=tiny_config("clip"))


@OF_IMAGES
def test_texts_have_one_or_more_images_of_any_size(tmp_path: Path, tokenizer: Any) -> None:
    """Those of a record in their order; where its text names none they stand before it, as the config says."""
    for name, size in (("a", (8, 8)), ("b", (16, 8)), ("thin", (300, 1))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    records = [
        {"image": ["b.png", "a.png"], "prompt": "w0 ? w1 ?", "completion": " w2"},
        {"image": "a.png", "prompt": "w0", "completion": " w2"},
    ]
    images = Qwen2VLImageProcessorPil(patch_size=2, merge_size=2, min_pixels=64, max_pixels=256)
    for part in (tokenizer, images):
        part.save_pretrained(tmp_path / "processor")
    places = {name: str(tmp_path / "processor") for name in ("processor", "tokenizer")}
    data = DataSection(source=str(tmp_path / "a.jsonl"), records="pairs", eval_fraction=0.0, augment=False, **places)
    image, first, start = (tokenizer.convert_tokens_to_ids(word) for word in ("?", "w0", "w7"))
    config = tiny_config("qwen2_vl", image_token_id=image, vision_start_token_id=start, vision_end_token_id=start + 1)

    def loaded(*more: dict[str, Any], config: Any = config, seq_len: int = 20, **changed: Any) -> Samples:
        lines = (json.dumps(record) + "\n" for record in (*more, *records))
        (tmp_path / "a.jsonl").write_text("".join(lines))
        train = TrainSection(global_batch_size=2, seq_len=seq_len, num_steps=1)
        return load_dataset(data.model_copy(update=changed), train, tmp_path, config=config).samples

    batch = loaded().gather([0, 1], [Draw(0, 2, 0), Draw(0, 2, 1)])
    assert batch["input_ids"][0, :15].tolist() == [first, *[image] * 8, first + 1, *[image] * 4, first + 2]
    assert batch["input_ids"][1, :7].tolist() == [start, *[image] * 4, start + 1, first]
    learnt = torch.full((2, 20), IGNORED_LABEL)
    learnt[0, 13], learnt[0, 14], learnt[1, 6], learnt[1, 7] = first + 2, 4, first + 2, 4  # 4 ends a text
    assert torch.equal(batch["labels"], learnt)
    assert batch["image_grid_thw"].tolist() == [[1, 4, 8], [1, 4, 4], [1, 4, 4]]
    grids = Grids.of(config)
    assert grids is not None
    assert grids.problem(batch) is None
    thin = {"image": ["a.png", "thin.png"], "prompt": "w0 ?", "completion": "w1"}
    with pytest.raises(DataError, match=r"a\.jsonl:1 has an image that the processor refuses .* mend or remove it"):
        loaded(thin)
    assert len(loaded(thin, skip_bad_records=True)) == 2
    with pytest.raises(DataError, match=r"a\.jsonl:1 names 1 images, but a sample has 2; mend that text"):
        loaded({**thin, "image": ["a.png", "b.png"]})
    with pytest.raises(DataError, match=r"a\.jsonl:1 names two images with no token between them; put the model's own"):
        loaded({**records[0], "prompt": "w0 ? ?"})
    with pytest.raises(DataError, match=r"a\.jsonl:1 has 16 tokens, 12 of them its images', of which .* raise seq_len"):
        loaded(seq_len=14)
    with pytest.raises(DataError, match=r"which no crop may change; set data\.augment = false"):
        loaded(augment=True)
    with pytest.raises(DataError, match=r"a\.jsonl:1 has 2 images, but this model takes one a text; give one"):
        loaded(config=tiny_config("llava", image_token_id=image))
    Qwen2VLImageProcessorPil(patch_size=4).save_pretrained(tmp_path / "other")
    with pytest.raises(
        DataError, match=r"other' makes no patches of 24 numbers, for 2 x 2 of which .* the model's own"
    ):
        loaded(processor=str(tmp_path / "other"))


@pytest.mark.parametrize("kind", [Qwen2VLImageProcessorPil, Glm4vImageProcessorPil])
def test_an_image_of_any_size_takes_the_tokens_that_its_processor_makes(kind: Any, folder: Path) -> None:
    sizes = [(8, 8), (97, 13), (13, 97), (5, 40), (64, 64), (33, 20)]
    contents = [png(COLORS[0], size) for size in sizes]
    pictures = [Picture(str(size), partial(bytes, content)) for size, content in zip(sizes, contents, strict=True)]
    reads = kind(patch_size=2, merge_size=2, size={"shortest_edge": 256, "longest_edge": 2048})
    samples = ToldGrids(pictures, [np.array([7])] * len(sizes), reads, 300, ImageTokens(6), padding=4)
    batch = samples.gather(range(len(sizes)), [])
    tokens = (batch["input_ids"] == 6).sum(dim=1)
    assert torch.equal(tokens, batch["image_grid_thw"].prod(dim=1) // 4)
    assert len(set(tokens.tolist())) > 2


def test_greys_of_sixteen_bits_keep_their_shades() -> None:
    ramp_16 = (np.arange(16, dtype=np.uint16) * 4096).reshape(4, 4)
    opened = np.asarray(picture_of(Image.fromarray(ramp_16), "png").open())
    assert opened.shape == (4, 4, 3)
    assert (opened == (ramp_16 >> 8)[..., None]).all()
    with pytest.raises(DataError, match="mode F, whose white is not known; make them 8 or 16 bits"):
        picture_of(Image.fromarray(ramp_16.astype(np.float32)), "tiff").open()


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparent_colours_is_read_without_a_warning() -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    file = io.BytesIO()
    image.save(file, "png", transparency=b"\xff\x80")
    opened = Picture("a.png", file.getvalue).open()
    assert opened.getpixel((0, 0)) == (200, 100, 50)


def picture_of(image: Image.Image, kind: str) -> Picture:
    file = io.BytesIO()
    image.save(file, kind)
    return Picture("a." + kind, file.getvalue)
