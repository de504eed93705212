"""A tiny Whisper learns to write down melodies: `python examples/tones.py`.

Plays four tones of a scale one after the other, by sines of random loudness with noise, then runs `galvatron run
examples/tones.toml`; the exported model names the tones of melodies held out.
"""

import json
import os
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
from transformers import AutoProcessor, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor
from words import tokenizer_of

HERE, RUN, DATA = Path(__file__).resolve().parent, Path("runs/tones"), Path("runs/tones-data")
SCALE = {"do": 262, "re": 294, "mi": 330, "fa": 349, "sol": 392, "la": 440, "si": 494}  # Hz
RATE, TONES = 16000, 4


def melodies(count: int, part: str):
    """``count`` melodies, float [samples], and the names of their tones."""
    random = np.random.RandomState(len(part))
    for _ in range(count):
        names = random.choice(list(SCALE), TONES)
        times = np.arange(RATE // TONES) / RATE
        melody = np.hstack([random.uniform(0.2, 0.6) * np.sin(2 * np.pi * SCALE[name] * times) for name in names])
        yield melody + random.normal(0, 0.01, len(melody)), list(names)


def write(part: str, count: int) -> None:
    """``count`` melodies of ``part`` as .wav files, and a record a line."""
    (DATA / part).mkdir(parents=True, exist_ok=True)
    with open(DATA / f"{part}.jsonl", "w") as records:
        for number, (melody, names) in enumerate(melodies(count, part)):
            with wave.open(str(DATA / part / f"{number:05d}.wav"), "wb") as file:
                file.setparams((1, 2, RATE, 0, "NONE", ""))
                file.writeframes((melody.clip(-1, 1) * 32767).astype("<i2").tobytes())
            records.write(json.dumps({"audio": f"{part}/{number:05d}.wav", "text": " ".join(names)}) + "\n")


def prepare(train: int = 2000, held_out: int = 192) -> None:
    """So many melodies with the names of their tones, and a processor of both."""
    for part, count in (("train", train), ("held-out", held_out)):
        write(part, count)
    tokenizer = tokenizer_of(SCALE, ("<pad>", "<end>", "<start>", "<unk>"), "<start> $A <end>")
    hears = WhisperFeatureExtractor(feature_size=80, sampling_rate=RATE, hop_length=160, chunk_length=1, n_fft=800)
    WhisperProcessor(hears, tokenizer).save_pretrained(DATA / "processor")


def main(*options: str) -> None:
    """Train and export; ``options`` are those of ``galvatron run``."""
    prepare()
    galvatron = [sys.executable, "-m", "galvatron"]
    subprocess.run([*galvatron, "run", str(HERE / "tones.toml"), *options], check=True)
    if not (RUN / "exported").exists():
        subprocess.run([*galvatron, "convert", "to-hf", str(RUN), str(RUN / "exported")], check=True)

    model = WhisperForConditionalGeneration.from_pretrained(RUN / "exported")
    processor = AutoProcessor.from_pretrained(RUN / "exported")
    played, names = zip(*melodies(192, "held-out"), strict=True)
    heard = processor(audio=list(played), sampling_rate=RATE, return_tensors="pt")["input_features"]
    said = processor.batch_decode(model.generate(heard, max_new_tokens=TONES), skip_special_tokens=True)
    right = sum(" ".join(tones) == text.strip() for tones, text in zip(names, said, strict=True))
    print(f"in transformers the exported model writes {right} of {len(names)} melodies without a mistake")


if __name__ == "__main__":
    os.chdir(HERE.parent)  # the job file's paths are relative to it
    main(*sys.argv[1:])
