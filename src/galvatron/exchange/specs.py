"""Which model a file is about: by name, configuration or profile.

Takes a card's name, a Hugging Face ``config.json`` or a ``model.json``; gives its ModelSpec.
"""

from __future__ import annotations

import re
from pathlib import Path

from galvatron.core.errors import ProfileError
from galvatron.core.model import ModelSpec, Precision
from galvatron.core.model_profile import ModelProfile
from galvatron.core.records import read_text

CARDS = {"swin-huge": "swin-h"}
"""Hetu-Galvatron's names of models that have another name here."""
PRECISIONS: dict[str, Precision] = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}

_FILE_NAME = re.compile(r"(?:computation|memory)_profiling_([a-z0-9]+)_(.+?)(_all)?")


def named_spec(name: str) -> ModelSpec:
    """The shapes of a model: a card's name, a configuration, or the model.json of a profile.

    Raises:
        ConfigError: there is no such card or configuration.
        ProfileError: the model.json is malformed.
    """
    path = Path(name)
    if path.is_file() and f'"{ModelProfile.FORMAT}"' in read_text(path, ProfileError):
        return ModelProfile.load(path).spec
    from galvatron.estimate import model_spec

    return model_spec(name)


def card_of_file(path: Path) -> str:
    """The model's name in a profile's file name: ``computation_profiling_bf16_t5-3B.json`` → ``t5-3b``.

    Raises:
        ProfileError: the name has another form.
    """
    name = _name_parts(path)[1].lower()
    return CARDS.get(name, name)


def precision_of_file(path: Path) -> Precision:
    """The precision in a profile's file name.

    Raises:
        ProfileError: the name has another form, or the precision is one that plans do not have.
    """
    precision = _name_parts(path)[0]
    if precision not in PRECISIONS:
        raise ProfileError(
            f"{path.name} was measured in {precision}, but profiles are of {' or '.join(PRECISIONS)}; give such a file"
        )
    return PRECISIONS[precision]


def _name_parts(path: Path) -> tuple[str, str]:
    match = _FILE_NAME.fullmatch(path.stem)
    if match is None:
        raise ProfileError(
            f"{path.name} must be called computation_profiling_PRECISION_MODEL.json to tell its model and precision; "
            "rename it, and give the model by --model"
        )
    return match[1], match[2]
