"""How long a search looks, and how closely.  A proof within the gap ends it; so does the time limit, at any point."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


class TimeUp(Exception):
    """The time limit of a search was reached; what has been found so far holds."""


@dataclass(frozen=True, slots=True)
class Patience:
    """``gap``: how much slower than proven possible the answer may be, a fraction of it; ``until``: monotonic time."""

    gap: float = 0.0
    until: float = math.inf

    @classmethod
    def of(cls, gap: float, time_limit_s: float | None) -> Patience:
        """From now on."""
        return cls(gap, math.inf if time_limit_s is None else time.monotonic() + time_limit_s)

    def check(self) -> None:
        """Raise TimeUp once the time limit is reached."""
        if time.monotonic() >= self.until:
            raise TimeUp


ENDLESS = Patience()
