"""What a search may choose from: the space, and what the user pins, forbids or bounds.

Takes words such as ``tp=8`` and ``ulysses``; gives Limits, which say of any value whether it is allowed.  Knows
nothing of costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from galvatron.core.errors import ConfigError
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
WORDS: dict[str, tuple[str, ...]] = {"schedule": SCHEDULES, "recompute": ("none", "selective", "full")}


@dataclass(frozen=True)
class Limits:
    """``fix``: the only value of a dimension (of every layer); ``forbid``: dimensions that stay neutral, schedules or
    recompute modes that are not used; ``at_most``: the largest value of a dimension."""

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
        """From the words of a command line; raises ConfigError for unknown ones."""
        if space not in SPACES:
            raise ConfigError(f"space={space!r} is not known; choose one of {', '.join(SPACES)}")
        known = (*DIMENSIONS, *WORDS["schedule"], *WORDS["recompute"][1:])
        unknown = [word for word in forbid if word not in known]
        if unknown:
            raise ConfigError(f"--forbid {unknown[0]} is not known; choose from {', '.join(known)}")
        bounds = {}
        for name, value in map(_pair, at_most):
            if not isinstance(value, int) or name in WORDS:
                raise ConfigError(
                    f"--max {name}={value} needs a dimension that counts and a whole number; such as tp=8"
                )
            bounds[name] = value
        fixed = dict(map(_pair, fix))
        for name, value in fixed.items():
            if (name in WORDS) != isinstance(value, str) or (name in WORDS and value not in WORDS[name]):
                raise ConfigError(f"--fix {name}={value} is no value of {name}; give {_example(name)}")
        return cls(space, fixed, frozenset(forbid), bounds)

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


def _pair(text: str) -> tuple[str, Value]:
    name, _, value = text.partition("=")
    if name not in DIMENSIONS or not value:
        raise ConfigError(f"{text!r} is no dimension=value; dimensions: {', '.join(DIMENSIONS)}")
    return name, int(value) if value.isdigit() else value


def _example(name: str) -> str:
    return (
        " or ".join(f"{name}={word}" for word in WORDS[name]) if name in WORDS else f"a whole number such as {name}=2"
    )
