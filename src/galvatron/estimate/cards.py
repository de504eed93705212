"""Published models by name: their configurations' numbers, nothing else.

Takes a card's name or a ``config.json``; gives a ModelSpec.  The files beside this one hold just the keys that set
shapes, as each model's publication or configuration gives them.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from galvatron.core.errors import ConfigError
from galvatron.core.model import ModelSpec
from galvatron.core.parsing import is_file, parse_json, read_text
from galvatron.core.tasks import Task
from galvatron.core.words import did_you_mean, plain, shown

from .config import spec_of_config

_FOLDER = files(__package__).joinpath("cards")
CARDS: tuple[str, ...] = tuple(
    sorted(entry.name.removesuffix(".json") for entry in _FOLDER.iterdir() if entry.name.endswith(".json"))
)
"""The names of all cards."""
_NO_SHAPES = ("meta", "hf", "base", "instruct", "chat", "it", "v0.1", "uncased")
"""Words of hub names that say nothing of shapes."""


def model_spec(name_or_path: str, task: Task | None = None) -> ModelSpec:
    """The model of a card, of a ``config.json``, or of a directory that holds one, for ``task``.

    Cards may be called as on the hub: ``meta-llama/Llama-3.1-8B`` and ``llama-3.1-8b`` are ``llama3.1-8b``.

    Raises:
        ConfigError: it is none of these, or the configuration cannot be read.
    """
    if name_or_path.lower() in CARDS:
        return _card(name_or_path.lower(), task)
    path = Path(name_or_path)
    if is_file(str(path / "config.json")):
        path = path / "config.json"
    if not is_file(str(path)):
        return _card(_called(name_or_path), task)
    named = path.parent.name if path.name == "config.json" and path.parent.name else path.stem
    return spec_of_config(_parse(read_text(path, ConfigError), str(path)), named, task)


def _called(name: str) -> str:
    """The card that goes by ``name`` on the hub: case, dashes, owner and what says how it was tuned make no difference.

    Raises:
        ConfigError: there is none.
    """
    words = [word for word in re.split(r"[-_ ]", name.lower().rpartition("/")[2]) if word not in _NO_SHAPES]
    found = {plain(card): card for card in CARDS}.get(plain("".join(words)))
    if found is None:
        raise ConfigError(
            f"{shown(name)} is no card, no config.json and no directory with one"
            f"{did_you_mean(''.join(words), CARDS)}give a path or one of {', '.join(CARDS)}"
        )
    return found


def _card(name: str, task: Task | None) -> ModelSpec:
    text = _FOLDER.joinpath(f"{name}.json").read_text(encoding="utf-8")
    return spec_of_config(_parse(text, f"card {name}"), name, task)


def _parse(text: str, source: str) -> dict[str, Any]:
    data = parse_json(text, source, ConfigError, "give a Hugging Face config.json")
    if not isinstance(data, dict):
        raise ConfigError(f"{source} must be a JSON object, got {type(data).__name__}; give a Hugging Face config.json")
    return data
