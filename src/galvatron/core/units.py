"""Base units inside, people's units at the edge: bytes, seconds, FLOPs as numbers; ``36GiB`` as text."""

from __future__ import annotations

import re

from .errors import ConfigError

_BYTES = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    _BYTES[f"{_letter}iB"] = 1024**_power
    _BYTES[f"{_letter}B"] = 1000**_power

DTYPE_BYTES = {"fp32": 4, "bf16": 2}


def parse_bytes(text: str | int) -> int:
    """``"36GiB"`` → 38654705664.  ``GB`` is 10⁹ bytes, ``GiB`` is 2³⁰; a bare number is bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2] not in _BYTES:
        raise ConfigError(f"a memory size is a number with a unit, got {text!r}; write 512MiB, 36GiB or 80GB")
    return int(float(match[1]) * _BYTES[match[2]])


def format_bytes(count: float) -> str:
    """Bytes for people, in binary units: ``1536`` → ``"1.5 KiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def format_seconds(seconds: float) -> str:
    """Seconds for people: ``0.0123`` → ``"12.3 ms"``."""
    if seconds == 0:
        return "0 s"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= scale or unit == "µs":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError("unreachable")
