"""A CLIP learns which words go with which picture of digits: `python examples/captions.py`.

Puts four of scikit-learn's handwritten digits on each picture and their names below it, then runs
`galvatron run examples/captions.toml`; the exported model finds the right words for pictures of digits held out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoProcessor, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from words import tokenizer_of

HERE, RUN, DATA = Path(__file__).resolve().parent, Path("runs/captions"), Path("runs/captions-data")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT = 5  # every fifth digit
SIZE = {"height": 16, "width": 16}


def boards(count: int, part: str):
    """``count`` pictures of two by two digits, 16 x 16 pixels, and the digits by row; of no digit of another part."""
    digits = load_digits()
    own = [i for i in range(len(digits.target)) if (i % HELD_OUT == 0) == (part == "held-out")]
    random = np.random.RandomState(len(part))
    for _ in range(count):
        drawn = random.choice(own, 4)
        rows = [np.hstack([digits.images[i] for i in pair]) for pair in (drawn[:2], drawn[2:])]
        image = Image.fromarray((np.vstack(rows) * 15.9).astype("uint8")).convert("RGB")
        yield image, [int(digits.target[i]) for i in drawn]


def write(part: str, count: int, folder: Path, say) -> None:
    """``count`` pictures of ``part`` into ``folder``, and a record a line: the image and what ``say`` makes of it."""
    (folder / part).mkdir(parents=True, exist_ok=True)
    with open(folder / f"{part}.jsonl", "w") as records:
        for number, (image, digits) in enumerate(boards(count, part)):
            image.save(folder / part / f"{number:05d}.png")
            records.write(json.dumps({"image": f"{part}/{number:05d}.png", **say(number, digits)}) + "\n")


def prepare(train: int = 4000, held_out: int = 384) -> None:
    """So many pictures with their words, and a processor of both."""
    for part, count in (("train", train), ("held-out", held_out)):
        write(part, count, DATA, lambda _, digits: {"text": " ".join(NAMES[digit] for digit in digits)})
    tokenizer = tokenizer_of(NAMES, ("<pad>", "<end>", "<start>", "<unk>"), "<start> $A <end>")
    images = CLIPImageProcessorPil(size=SIZE, crop_size=SIZE, resample=0)
    CLIPProcessor(images, tokenizer).save_pretrained(DATA / "processor")


def main(*options: str) -> None:
    """Train and export; ``options`` are those of ``galvatron run``."""
    prepare()
    galvatron = [sys.executable, "-m", "galvatron"]
    subprocess.run([*galvatron, "run", str(HERE / "captions.toml"), *options], check=True)
    if not (RUN / "exported").exists():
        subprocess.run([*galvatron, "convert", "to-hf", str(RUN), str(RUN / "exported")], check=True)

    model, processor = (kind.from_pretrained(RUN / "exported") for kind in (CLIPModel, AutoProcessor))
    pictures, digits = zip(*boards(64, "held-out"), strict=True)
    texts = [" ".join(NAMES[digit] for digit in four) for four in digits]
    with torch.inference_mode():
        scores = model(**processor(text=texts, images=list(pictures), return_tensors="pt")).logits_per_image
    found = [texts[number] for number in scores.argmax(-1)]
    right = sum(own == other for own, other in zip(texts, found, strict=True))
    print(f"in transformers the exported model finds the words of {right} of {len(texts)} pictures among all of them")


if __name__ == "__main__":
    os.chdir(HERE.parent)  # the job file's paths are relative to it
    main(*sys.argv[1:])
