"""Base units inside, people's units at the edge: bytes, seconds, FLOPs as numbers; ``36GiB`` as text."""

from __future__ import annotations

import math
import re

from .errors import ConfigError
from .numbers import MAX_BYTES
from .words import shown

_BYTES = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    _BYTES[f"{_letter}ib"] = _BYTES[f"{_letter}i"] = _BYTES[_letter] = 1024**_power
    _BYTES[f"{_letter}b"] = 1000**_power
LEAST_WITHOUT_UNIT = 2**20
"""A bare number below is taken for GiB with the unit forgotten, and refused."""

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def parse_bytes(text: str | int) -> int:
    """``"36GiB"`` → 38654705664, in any case, with or without a space.

    ``GB`` is 10⁹ bytes; ``GiB``, ``Gi`` and ``G`` are 2³⁰, as GNU's tools and Slurm have it.  A bare number is bytes.

    Raises:
        ConfigError: it is none of these, zero, a small number without a unit, or beyond an exbibyte.
    """
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*", str(text), re.ASCII)
    unit = None if match is None else _BYTES.get(match[2].lower())
    if match is None or unit is None:
        raise ConfigError(f"a memory size is a number with a unit, got {shown(text)}; write 512MiB, 36GiB or 80GB")
    count = int(float(match[1]) * unit)
    if not 1 <= count <= MAX_BYTES:
        raise ConfigError(f"a memory size is from 1 byte to {MAX_BYTES} bytes, got {text!r}; write 512MiB or 36GiB")
    if not match[2] and count < LEAST_WITHOUT_UNIT:
        raise ConfigError(f"a memory size needs its unit, got {text!r}; write {match[1]}GiB or {match[1]}MiB")
    return count


def parse_seconds(text: str) -> float:
    """``"30s"`` → 30.0; ``5m`` and ``1h`` alike.

    Raises:
        ConfigError: it is none of these, or zero.
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(s|m|h)\s*", text, re.ASCII)
    seconds = 0.0 if match is None else float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
    if not seconds:
        raise ConfigError(f"a time is a positive number with a unit, got {shown(text)}; write 30s, 5m or 1h")
    return seconds


def format_bytes(count: float) -> str:
    """Bytes for people, in binary units: ``1536`` → ``"1.5 KiB"``."""
    value, unit = _binary(count)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def enough_bytes(count: int) -> str:
    """The same of a size to ask for, rounded up to a hundredth: ``1537`` → ``"1.51 KiB"``."""
    value, unit = _binary(count)
    return f"{math.ceil(value * 100) / 100:.2f} {unit}"


def _binary(count: float) -> tuple[float, str]:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return count, unit
        count /= 1024
    return count, "TiB"


def format_seconds(seconds: float) -> str:
    """Seconds for people: ``0.0123`` → ``"12.3 ms"``."""
    if seconds == 0:
        return "0 s"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= scale or unit == "µs":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError("unreachable")


def format_rate(per_s: float) -> str:
    """How many a second for people: ``39412.3`` → ``"39,412"``, ``9.4876`` → ``"9.49"``."""
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


def counted(count: int, word: str) -> str:
    """``1 sequence``, ``2 sequences``, ``4 microbatches``."""
    return f"{count} {plural(count, word)}"


def plural(count: int, word: str) -> str:
    """``word`` as it stands after ``count``."""
    ending = "es" if word.endswith(("ch", "s")) else "s"
    return word if count == 1 else word + ending
