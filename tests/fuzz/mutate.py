"""Seeded damage to files: what people, editors, disks and other programs do to them.

Takes a text or bytes and a random generator; gives another one.  Knows nothing of what files mean.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

INTEGERS = (0, 1, -1, 2, 3, 5, 7, 8, 12, 64, 1000, 2**31 - 1, 2**31, 2**63, 10**12, 10**20, -(10**9))
FLOATS = (0.0, -0.0, 0.5, 1.5, -1e-9, 1e-300, 1e300, 2.0, float("nan"), float("inf"))
TEXTS = (
    "", " ", "x", "2", "none", "0-99999999999999", "5-2", "-", "²", "ключ", "a\0b", "\ud800", "../../etc/passwd", "/",
    "x" * 5000, "1f1b", "full", "24", "36GiB", "llama", "layer", "\n", "{}",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": 0}, [1, "a"])
ENDLESS = "9" * 5000
DEEP = 50_000


def mutated_data(data: Any, rng: random.Random) -> Any:
    """``data`` with one to three of its values, keys or entries changed."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(data))
        if not places:
            return _value(rng, [])
        holder, key = rng.choice(places)
        _CHANGES[rng.randrange(len(_CHANGES))](holder, key, rng, [h[k] for h, k in places])
    return data


def mutated_text(text: str, rng: random.Random) -> bytes:
    """``text`` as UTF-8 with one to three of its characters, numbers or lines changed."""
    raw = text.encode("utf-8", "surrogatepass")
    for _ in range(rng.choice((1, 1, 2, 3))):
        raw = rng.choice(_TEXT_CHANGES)(raw, rng)
    return raw


def _places(data: Any) -> Any:
    """(holder, key) of every value."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield data, key
        yield from _places(value)


def _value(rng: random.Random, others: list[Any]) -> Any:
    pool = rng.choice((INTEGERS, INTEGERS, FLOATS, TEXTS, OTHERS, others or OTHERS))
    return copy.deepcopy(rng.choice(pool))


def _replace(holder: Any, key: Any, rng: random.Random, others: list[Any]) -> None:
    holder[key] = _value(rng, others)


def _near(holder: Any, key: Any, rng: random.Random, others: list[Any]) -> None:
    """A number near the one that is there, which may well be right."""
    value = holder[key]
    if isinstance(value, int) and not isinstance(value, bool):
        holder[key] = rng.choice((value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value)))
    elif isinstance(value, float):
        holder[key] = value * rng.choice((0.5, 2, -1, 1e-6, 1e6, 1e12))
    else:
        holder[key] = _value(rng, others)


def _remove(holder: Any, key: Any, rng: random.Random, others: list[Any]) -> None:
    del holder[key]


def _rename(holder: Any, key: Any, rng: random.Random, others: list[Any]) -> None:
    if isinstance(holder, dict):
        holder[rng.choice((f"{key}s", str(key).replace("_", "-"), str(key).upper(), rng.choice(TEXTS)))] = holder.pop(
            key
        )
    else:
        holder.insert(key, copy.deepcopy(holder[key]))


def _wrap(holder: Any, key: Any, rng: random.Random, others: list[Any]) -> None:
    holder[key] = rng.choice(([holder[key]], {"a": holder[key]}, [holder[key]] * 3))


def _swap(holder: Any, key: Any, rng: random.Random, others: list[Any]) -> None:
    keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    other = rng.choice(list(keys))
    holder[key], holder[other] = holder[other], holder[key]


_CHANGES: tuple[Callable[[Any, Any, random.Random, list[Any]], None], ...] = (
    _replace, _replace, _near, _near, _remove, _rename, _wrap, _swap,
)  # fmt: skip


def _flip(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw) + 1)
    return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]


def _cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw) + 1)]


def _drop(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw) + 1)
    return raw[:at] + raw[at + rng.randrange(1, 20) :]


def _insert(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw) + 1)
    snippets = (b"{", b"}", b"[", b",", b'"', b"\0", b"\xff", b"\n", b"1e999", b"NaN", b"\\ud800", b"=", b"#", b"\r\n")
    return raw[:at] + rng.choice((*snippets, ENDLESS.encode())) + raw[at:]


def _number(raw: bytes, rng: random.Random) -> bytes:
    """Some digit becomes many, or a deep nest."""
    digits = [i for i, byte in enumerate(raw) if 48 <= byte <= 57]
    if not digits:
        return raw
    at = rng.choice(digits)
    new = rng.choice((ENDLESS.encode(), b"1" + b"0" * 12, b"1" + b"0" * 20, b"-1", b"0", b"1.5", b"[" * DEEP, b"0x7f"))
    return raw[:at] + new + raw[at + 1 :]


def _lines(raw: bytes, rng: random.Random) -> bytes:
    lines = raw.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at : at + 1] = rng.choice(([], [lines[at]] * 2, [rng.choice(lines)], [lines[at][::-1]]))
    return b"\n".join(lines)


_TEXT_CHANGES = (_flip, _cut, _drop, _insert, _number, _lines)


def to_json(data: Any) -> str:
    """JSON that may hold what JSON should not: NaN, and half characters as escapes."""
    return json.dumps(data, indent=2)


def to_toml(data: Any) -> str:
    """A job's TOML; what TOML has no word for is left out."""
    if not isinstance(data, dict):
        return f"job = {_toml_value(data)}\n"
    plain = {k: v for k, v in data.items() if not isinstance(v, dict)}
    lines = [f"{_toml_key(k)} = {_toml_value(v)}" for k, v in plain.items() if v is not None]
    for name, section in data.items():
        if isinstance(section, dict):
            lines.append(f"[{_toml_key(name)}]")
            lines += [f"{_toml_key(k)} = {_toml_value(v)}" for k, v in section.items() if v is not None]
    return "\n".join(lines) + "\n"


def _toml_key(key: Any) -> str:
    return json.dumps(str(key))


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value if v is not None) + "]"
    return json.dumps(value).replace("Infinity", "inf").replace("NaN", "nan")
