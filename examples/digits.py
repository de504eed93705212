"""A ViT learns to read scikit-learn's handwritten digits: `python examples/digits.py`.

Writes them as images, a folder a digit, then runs `galvatron run examples/digits.toml`; the exported model reads some.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

HERE, RUN, DATA = Path(__file__).resolve().parent, Path("runs/digits"), Path("runs/digits-data")
HELD_OUT = 5  # every fifth image


def prepare() -> None:
    """The 1,797 images of 8 x 8 pixels, and a processor that leaves them as large."""
    digits = load_digits()
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "held-out" if number % HELD_OUT == 0 else "train"
        path = DATA / part / str(digit) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).convert("RGB").save(path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(DATA / "processor")


def main(*options: str) -> None:
    """Train and export; ``options`` are those of ``galvatron run``."""
    prepare()
    galvatron = [sys.executable, "-m", "galvatron"]
    subprocess.run([*galvatron, "run", str(HERE / "digits.toml"), *options], check=True)
    if not (RUN / "exported").exists():
        subprocess.run([*galvatron, "convert", "to-hf", str(RUN), str(RUN / "exported")], check=True)

    model = AutoModelForImageClassification.from_pretrained(RUN / "exported").eval()
    paths = sorted((DATA / "held-out").rglob("*.png"))
    images = AutoImageProcessor.from_pretrained(DATA / "processor")([Image.open(p) for p in paths], return_tensors="pt")
    with torch.inference_mode():
        read = model(**images).logits.argmax(-1)
    right = sum(int(path.parent.name) == digit for path, digit in zip(paths, read.tolist(), strict=True))
    print(
        f"in transformers the exported model reads {right} of {len(paths)} held-out digits ({right / len(paths):.1%})"
    )


if __name__ == "__main__":
    os.chdir(HERE.parent)  # the job file's paths are relative to it
    main(*sys.argv[1:])
