"""A tiny LLaVA learns to answer questions about pictures of digits: `python examples/questions.py`.

Asks of every picture (made by captions.py) which digit is where, then runs `galvatron run examples/questions.toml`;
the exported model answers questions about pictures of digits held out.
"""

import os
import subprocess
import sys
from pathlib import Path

from captions import NAMES, SIZE, boards, write
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from words import tokenizer_of

HERE, RUN, DATA = Path(__file__).resolve().parent, Path("runs/questions"), Path("runs/questions-data")
PLACES = ("top left", "top right", "bottom left", "bottom right")
WORDS = ("which", "digit", "is", "top", "bottom", "left", "right", "?", "digits", "are", "these")


def question(kind: int, digits: list[int]) -> dict[str, str]:
    """Which digit is at one of the places or, of the last ``kind``, at all of them; and its answer."""
    if kind == len(PLACES):
        said = " ".join(NAMES[digit] for digit in digits)
        return {"prompt": "<image> which digits are these ?", "completion": f" {said}"}
    return {"prompt": f"<image> which digit is {PLACES[kind]} ?", "completion": f" {NAMES[digits[kind]]}"}


def prepare(train: int = 4000, held_out: int = 384) -> None:
    """So many pictures with questions and answers, and a processor of both."""
    for part, count in (("train", train), ("held-out", held_out)):
        write(part, count, DATA, lambda number, digits: question(number % (len(PLACES) + 1), digits))
    tokenizer = tokenizer_of((*NAMES, *WORDS), ("<pad>", "<end>", "<start>", "<image>", "<unk>"), "$A")
    images = CLIPImageProcessorPil(size=SIZE, crop_size=SIZE, resample=0)
    LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(DATA / "processor")


def main(*options: str) -> None:
    """Train and export; ``options`` are those of ``galvatron run``."""
    prepare()
    galvatron = [sys.executable, "-m", "galvatron"]
    subprocess.run([*galvatron, "run", str(HERE / "questions.toml"), *options], check=True)
    if not (RUN / "exported").exists():
        subprocess.run([*galvatron, "convert", "to-hf", str(RUN), str(RUN / "exported")], check=True)

    model = LlavaForConditionalGeneration.from_pretrained(RUN / "exported")
    processor = AutoProcessor.from_pretrained(RUN / "exported")
    pictures, digits = zip(*boards(384, "held-out"), strict=True)
    asked = [question(number % len(PLACES), four) for number, four in enumerate(digits)]
    inputs = processor(text=[each["prompt"] for each in asked], images=list(pictures), return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=2, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = processor.batch_decode(said, skip_special_tokens=True)
    right = sum(each["completion"].strip() == answer for each, answer in zip(asked, answers, strict=True))
    print(f"in transformers the exported model answers {right} of {len(asked)} questions ({right / len(asked):.1%})")


if __name__ == "__main__":
    os.chdir(HERE.parent)  # the job file's paths are relative to it
    main(*sys.argv[1:])
