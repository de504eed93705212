"""Published models by name: their configurations' numbers, nothing else.

Takes a card's name or a ``config.json``; gives a ModelSpec.  The files beside this one hold just the keys that set
shapes, as each model's publication or configuration gives them.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from galvatron.core.errors import ConfigError
from galvatron.core.model import ModelSpec
from galvatron.core.records import read_text

from .config import spec_of_config

_FOLDER = files(__package__).joinpath("cards")
CARDS: tuple[str, ...] = tuple(
    sorted(entry.name.removesuffix(".json") for entry in _FOLDER.iterdir() if entry.name.endswith(".json"))
)
"""The names of all cards."""


def model_spec(name_or_path: str) -> ModelSpec:
    """The model of a card (in any case), of a ``config.json``, or of a directory that holds one.

    Raises:
        ConfigError: it is none of these, or the configuration cannot be read.
    """
    if name_or_path.lower() in CARDS:
        return _card(name_or_path.lower())
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{name_or_path!r} is no card, no config.json and no directory with one; give a path or one of "
            f"{', '.join(CARDS)}"
        )
    named = path.parent.name if path.name == "config.json" and path.parent.name else path.stem
    return spec_of_config(_parse(read_text(path, ConfigError), str(path)), named)


def _card(name: str) -> ModelSpec:
    text = _FOLDER.joinpath(f"{name}.json").read_text(encoding="utf-8")
    return spec_of_config(_parse(text, f"card {name}"), name)


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source} is not JSON ({error}); give a Hugging Face config.json") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source} must be a JSON object, got {type(data).__name__}; give a Hugging Face config.json")
    return data
