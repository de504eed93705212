"""What a search may choose from: the space, and what the user pins, forbids or bounds.

Takes words such as ``tp=8`` and ``ulysses``; gives Limits, which say of any value whether it is allowed.  Knows
nothing of costs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, cast, get_args

from galvatron.core.errors import ConfigError
from galvatron.core.model import RECOMPUTES
from galvatron.core.words import did_you_mean, plain, shown
from galvatron.plan.plan import SCHEDULES
from galvatron.plan.rules import RUNTIME_ONLY_ONE, RUNTIME_SCHEDULES

Value = int | str
SpaceName = Literal["runtime", "all", "dp", "fsdp", "tp", "pp", "3d", "uniform"]
SPACES: tuple[SpaceName, ...] = get_args(SpaceName)

NEUTRAL: dict[str, Value] = {
    "pp": 1,
    "num_microbatches": 1,
    "model_chunks": 1,
    "tp": 1,
    "ulysses": 1,
    "cp": 1,
    "ep": 1,
    "dp_shard": 1,
    "dp_replicate": 1,
    "zero": 0,
    "recompute": "none",
}
"""Every dimension but the schedule, with the value that makes no use of it."""

DIMENSIONS = ("schedule", *NEUTRAL)
WORDS: dict[str, tuple[str, ...]] = {"schedule": SCHEDULES, "recompute": RECOMPUTES}


@dataclass(frozen=True)
class Limits:
    """``fix``: the only value of a dimension (of every layer); ``forbid``: dimensions that stay neutral, schedules or
    levels of recompute that are not used; ``at_most``: the largest value of a dimension."""

    space: SpaceName = "runtime"
    fix: Mapping[str, Value] = field(default_factory=dict)
    forbid: frozenset[str] = frozenset()
    at_most: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def parse(
        cls,
        space: str = "runtime",
        fix: Iterable[str] = (),
        forbid: Iterable[str] = (),
        at_most: Iterable[str] = (),
    ) -> Limits:
        """From the words of a command line, in any case and with dashes; raises ConfigError for unknown ones."""
        known = (*DIMENSIONS, *WORDS["schedule"], *WORDS["recompute"][1:])
        return cls(
            cast(SpaceName, _word(space, SPACES, "--space")),
            dict(_fixed(text) for text in fix),
            frozenset(_word(text, known, "--forbid") for text in forbid),
            dict(_bound(text) for text in at_most),
        )

    def problem(self) -> str | None:
        """The first limit that contradicts another, as a sentence; None if none does."""
        for name, value in self.fix.items():
            if not self.is_everything and not self._runs(name, value):
                usual = f"where {name} is {NEUTRAL[name]}" if name in RUNTIME_ONLY_ONE else "which has no such plan"
                return f"{name}={value} needs --space all: space={self.space} is what can be trained, {usual}"
            if isinstance(value, int) and value > self.at_most.get(name, value):
                return f"{name}={value} is fixed but at most {self.at_most[name]} is allowed; change one of them"
            if value in self.forbid or (name in self.forbid and value != NEUTRAL.get(name)):
                word = value if value in self.forbid else name
                return f"{name}={value} is fixed but {word} is forbidden; leave one of them out"
        return None

    def without_one(self) -> Iterator[tuple[str, Limits]]:
        """Every limit in words, with the limits that are left when it is dropped."""
        for name, value in self.fix.items():
            yield f"fix {name}={value}", replace(self, fix={k: v for k, v in self.fix.items() if k != name})
        for name, most in self.at_most.items():
            yield f"max {name}={most}", replace(self, at_most={k: v for k, v in self.at_most.items() if k != name})
        for word in sorted(self.forbid):
            yield f"forbid {word}", replace(self, forbid=self.forbid - {word})
        if self.space not in ("runtime", "all"):
            yield f"space {self.space}", replace(self, space="runtime")

    def allows(self, dimension: str, value: Value, *, end: bool = False) -> bool:
        """Whether a layer (or, with ``end``, an embedding or head) may have ``value``; ``fix`` is for layers alone."""
        if dimension in self.fix and not end and value != self.fix[dimension]:
            return False
        if isinstance(value, int) and value > self.at_most.get(dimension, value):
            return False
        if value in self.forbid or (dimension in self.forbid and value != NEUTRAL.get(dimension)):
            return False
        return self.is_everything or self._runs(dimension, value)

    @property
    def is_everything(self) -> bool:
        """Whether plans may use what the runtime cannot run yet."""
        return self.space == "all"

    @staticmethod
    def _runs(dimension: str, value: Value) -> bool:
        if dimension == "schedule":
            return value in RUNTIME_SCHEDULES
        return dimension not in RUNTIME_ONLY_ONE or value == 1


def _pair(text: str, option: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not value.strip():
        raise ConfigError(f"{shown(text)} is no dimension=value; dimensions: {', '.join(DIMENSIONS)}")
    return _word(name, DIMENSIONS, option), value.strip()


def _word(text: str, known: Iterable[str], option: str) -> str:
    """The known word that ``text`` is, whatever its case and dashes."""
    found = {plain(word): word for word in known}
    if plain(text) not in found:
        raise ConfigError(
            f"{option} {shown(text)} is not known{did_you_mean(text, found.values())}choose from "
            f"{', '.join(found.values())}"
        )
    return found[plain(text)]


def _fixed(text: str) -> tuple[str, Value]:
    name, value = _pair(text, "--fix")
    if name in WORDS:
        return name, _word(value, WORDS[name], f"--fix {name}:")
    return name, _number(name, value, "--fix")


def _bound(text: str) -> tuple[str, int]:
    name, value = _pair(text, "--max")
    if name in WORDS:
        raise ConfigError(f"--max {name}={shown(value)} needs a dimension that counts and a whole number; such as tp=8")
    return name, _number(name, value, "--max")


def _number(name: str, text: str, option: str) -> int:
    least, most = (0, 3) if name == "zero" else (1, 2**24)
    if not (re.fullmatch(r"\d{1,8}", text, re.ASCII) and least <= int(text) <= most):
        span = "0, 1, 2 or 3" if name == "zero" else f"a whole number from 1 to {most:,}"
        raise ConfigError(f"{option} {name}={shown(text)} is no value of {name}; give {span}")
    return int(text)
