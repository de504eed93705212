"""Parameters that are not trained, by name or pattern.

Takes a model and patterns (``model.layers.0.*``); sets ``requires_grad``.  Knows nothing of jobs or plans.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from fnmatch import fnmatchcase

from torch import nn

from galvatron.core.errors import ConfigError


def freeze_parameters(model: nn.Module, patterns: Collection[str]) -> None:
    """Let every parameter whose name one of ``patterns`` matches be without gradient.

    A pattern is a name or has ``*``, ``?`` and ``[...]`` as shells do.  A tied weight goes by the embedding's name.

    Raises:
        ConfigError: a pattern matches no parameter, or all parameters are frozen.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matches = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, parameters, n=3, cutoff=0.3) or list(parameters)[:3]
            raise ConfigError(f"freeze: {pattern!r} matches no parameter of the model; near it are {', '.join(near)}")
        for name in matches:
            parameters[name].requires_grad_(False)
    check_trains(model)


def check_trains(model: nn.Module) -> None:
    """Raise ConfigError if no parameter of ``model`` is trainable."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("every parameter of the model is frozen, nothing is left to train; freeze fewer")
