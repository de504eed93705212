"""A trained BERT learns to tell code, comments and documentation apart: `python examples/kinds_of_text.py`.

Writes lines of Python's library and their kinds, then runs `galvatron run examples/kinds_of_text.toml`, which starts
from what masked_words.py trained (and is run first, if need be).
"""

import ast
import io
import json
import os
import subprocess
import sys
import sysconfig
import tokenize
from pathlib import Path

import masked_words
from transformers import pipeline

HERE, RUN, DATA = Path(__file__).resolve().parent, Path("runs/kinds_of_text"), Path("runs/kinds_of_text-data")
HELD_OUT = 10  # every tenth line
TEXTS = ("return self._items[key]", "this may fail if the file is open", "Return a list of all matching names.")


def lines():
    """(text, kind) of what modules say: short statements, comments without their mark, sentences of docstrings."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and len(text := token.string.lstrip("# ").strip()) > 15:
                yield text, "comment"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                first = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
                if 15 < len(first) < 150:
                    yield first, "documentation"
            text = ast.unparse(node) if isinstance(node, ast.Assign | ast.Return) else ""
            if 15 < len(text) < 100 and "\n" not in text and '"' not in text:
                yield text, "code"


def prepare() -> None:
    """As many of each kind."""
    kinds: dict[str, list[str]] = {}
    for text, kind in lines():
        kinds.setdefault(kind, []).append(text)
    fewest = min(map(len, kinds.values()))
    DATA.mkdir(parents=True, exist_ok=True)
    with open(DATA / "train.jsonl", "w") as train, open(DATA / "held-out.jsonl", "w") as held_out:
        for number in range(fewest):
            for kind, texts in kinds.items():
                record = json.dumps({"text": texts[number * len(texts) // fewest], "label": kind})
                (held_out if number % HELD_OUT == 0 else train).write(record + "\n")
    print(f"{fewest} lines of each kind")


def main(*options: str) -> None:
    """Train and export; ``options`` are those of ``galvatron run``."""
    if not (masked_words.RUN / "exported").exists():
        masked_words.main()
    prepare()
    galvatron = [sys.executable, "-m", "galvatron"]
    subprocess.run([*galvatron, "run", str(HERE / "kinds_of_text.toml"), *options], check=True)
    if not (RUN / "exported").exists():
        subprocess.run([*galvatron, "convert", "to-hf", str(RUN), str(RUN / "exported")], check=True)

    found = pipeline("text-classification", model=str(RUN / "exported"))(list(TEXTS))
    for text, kind in zip(TEXTS, found, strict=True):
        print(f"{kind['label']:13}  {kind['score']:6.1%}  {text}")


if __name__ == "__main__":
    os.chdir(HERE.parent)  # the job file's paths are relative to it
    main(*sys.argv[1:])
