"""What a search may choose from: the space, and what the user pins, forbids or bounds.

Takes words such as ``tp=8``, ``head.tp=2`` and ``ulysses``; gives Limits, which say of any value whether it is
allowed.  Knows nothing of costs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar, cast, get_args

from galvatron.core.errors import ConfigError
from galvatron.core.model import ENDS, OFFLOADS, RECOMPUTES, UnitName
from galvatron.core.words import did_you_mean, plain, shown
from galvatron.cost.setting import Runtime
from galvatron.plan import hetu
from galvatron.plan.plan import SCHEDULES

T = TypeVar("T")
Value = int | str
SpaceName = Literal["runtime", "all", "hetu", "dp", "fsdp", "tp", "pp", "3d", "uniform"]
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
    "offload": "none",
}
"""Every dimension but the schedule, with the value that makes no use of it."""

ASKED_FOR = ("offload",)
"""What the runtime can do, but is chosen only under ``--space all`` or where it is fixed."""

DIMENSIONS = ("schedule", *NEUTRAL)
OF_ENDS = ("tp", "ulysses", "dp_shard", "dp_replicate", "zero")
"""What embedding and head have too; they are not recomputed and have no rings or experts."""
NAMES = (*DIMENSIONS, *(f"{end}.{name}" for end in ENDS for name in OF_ENDS))
WORDS: dict[str, tuple[str, ...]] = {"schedule": SCHEDULES, "recompute": RECOMPUTES, "offload": OFFLOADS}


@dataclass(frozen=True)
class Limits:
    """``fix``: the only value of a dimension; ``forbid``: dimensions that stay neutral, schedules or levels of
    recompute that are not used; ``at_most``: the largest value of a dimension.

    What is said of a dimension holds for layers, embedding and head.  What is said of an end by name, such as
    ``head.tp``, replaces that for this end; of tied ends, which are one tensor, for both (``of_tied_ends``).
    """

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
            _said_once(map(_fixed, fix), "--fix"),
            frozenset(_word(text, known, "--forbid") for text in forbid),
            _said_once(map(_bound, at_most), "--max"),
        )

    def problem(self) -> str | None:
        """The first limit that contradicts another, as a sentence; None if none does."""
        for name, value in self.fix.items():
            if not self._offers(name, value):
                what = "what plans of Hetu-Galvatron can say" if self.runtime == "hetu" else "what can be trained"
                return f"{name}={value} needs --space all: space={self.space} is {what}"
            if isinstance(value, int) and value > self.at_most.get(name, value):
                return f"{name}={value} is fixed but at most {self.at_most[name]} is allowed; change one of them"
            dimension = name.rpartition(".")[2]
            if value in self.forbid or (dimension in self.forbid and value != NEUTRAL.get(dimension)):
                word = value if value in self.forbid else dimension
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

    def of_tied_ends(self) -> Limits:
        """The same for ends that are one tensor: what is said of one is said of both.

        Raises:
            ConfigError: it contradicts itself.
        """
        fix, at_most = dict(self.fix), dict(self.at_most)
        for name in OF_ENDS:
            names = [f"{end}.{name}" for end in ENDS]
            fixed = {n: value for n in names if isinstance(value := self.fix.get(n), int)}
            bounds = {n: self.at_most[n] for n in names if n in self.at_most}
            fix |= dict.fromkeys(names if fixed else (), max(fixed.values(), default=0))
            at_most |= dict.fromkeys(names if bounds else (), min(bounds.values(), default=0))
            if len(set(fixed.values())) > 1 or any(v > b for v in fixed.values() for b in bounds.values()):
                said = [f"{n}={v}" for n, v in fixed.items()] + [f"{n} at most {b}" for n, b in bounds.items()]
                raise ConfigError(
                    f"{' and '.join(said)} cannot be, for the model's embedding and head are one tensor, cut alike; "
                    "say it of one of them"
                )
        return replace(self, fix=fix, at_most=at_most)

    def allows(self, dimension: str, value: Value, unit: UnitName | None = None) -> bool:
        """Whether a plan's outside, or ``unit``, may have ``value``."""
        name, fixed = self._said_of(dimension, unit)
        if fixed is not None and value != fixed:
            return False
        if isinstance(value, int) and value > self.at_most.get(name, value):
            return False
        if value in self.forbid or (dimension in self.forbid and value != NEUTRAL.get(dimension)):
            return False
        return self._offers(dimension, value)

    def _said_of(self, dimension: str, unit: UnitName | None) -> tuple[str, Value | None]:
        """The name under which something is said of a unit's dimension, and the value that is fixed."""
        own = f"{unit}.{dimension}"
        if unit not in ENDS or dimension in ASKED_FOR:
            return dimension, self.fix.get(dimension)
        if own in self.fix or own in self.at_most:
            return own, self.fix.get(own)
        if dimension not in OF_ENDS:
            return own, None
        fixed, rings = self.fix.get(dimension), self.fix.get("cp", 1)
        if dimension == "ulysses" and isinstance(fixed, int) and isinstance(rings, int):
            fixed *= rings  # ends cut by Ulysses the tokens that layers cut by rings
        return dimension, fixed

    @property
    def runtime(self) -> Runtime:
        """Who is to run the plans."""
        return "hetu" if self.space == "hetu" else "galvatron"

    def _offers(self, dimension: str, value: Value) -> bool:
        """Whether the space has such plans."""
        if self.space == "all" or dimension not in ("schedule", *ASKED_FOR):
            return True
        if dimension in ASKED_FOR:
            return value == NEUTRAL[dimension] or (self.space != "hetu" and value == self.fix.get(dimension))
        return self.space != "hetu" or value in hetu.SCHEDULES.values()


def _said_once(pairs: Iterable[tuple[str, T]], option: str) -> dict[str, T]:
    said: dict[str, T] = {}
    for name, value in pairs:
        if said.setdefault(name, value) != value:
            raise ConfigError(f"{option} says {name}={said[name]} and {name}={value}; leave one of them out")
    return said


def _pair(text: str, option: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not value.strip():
        raise ConfigError(f"{shown(text)} is no dimension=value; dimensions: {', '.join(NAMES)}")
    return _word(name, NAMES, option), value.strip()


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
    zero = name.rpartition(".")[2] == "zero"
    least, most = (0, 3) if zero else (1, 2**24)
    if not (re.fullmatch(r"\d{1,8}", text, re.ASCII) and least <= int(text) <= most):
        span = "0, 1, 2 or 3" if zero else f"a whole number from 1 to {most:,}"
        raise ConfigError(f"{option} {name}={shown(text)} is no value of {name}; give {span}")
    return int(text)
