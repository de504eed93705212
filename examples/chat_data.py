"""Conversations to fine-tune on, from what Python says of itself: `python examples/chat_data.py`.

Writes runs/chat/train.jsonl.gz and runs/chat/validation.jsonl: one conversation a line, as most chat data come.
"""

import gzip
import importlib
import inspect
import json
from pathlib import Path

MODULES = (
    "builtins", "collections", "functools", "itertools", "json", "math", "os", "os.path", "random", "re", "shutil",
    "statistics", "string", "time",
)  # fmt: skip
OUT = Path("runs/chat")


def conversations():
    """A question and an answer for every function and class that says in one sentence what it does."""
    for name in MODULES:
        module = importlib.import_module(name)
        for key, value in sorted(vars(module).items()):
            says = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
            if callable(value) and not key.startswith("_") and 20 < len(says) < 200:
                question = {"role": "user", "content": f"What does {name}.{key} do?"}
                yield {"messages": [question, {"role": "assistant", "content": says}]}


every = list(conversations())
OUT.mkdir(parents=True, exist_ok=True)
with gzip.open(OUT / "train.jsonl.gz", "wt") as train, open(OUT / "validation.jsonl", "w") as validation:
    for number, conversation in enumerate(every):
        (validation if number % 10 == 9 else train).write(json.dumps(conversation) + "\n")
print(f"{len(every)} conversations in {OUT}")
