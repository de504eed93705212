"""Text to data: JSON and TOML that hold plain, finite, once-given values, or one sentence on why they do not.

Takes texts and paths; gives dictionaries, lists, strings and numbers.  Knows nothing of what they mean.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from .errors import GalvatronError
from .words import shown

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: str | Path, error: type[GalvatronError]) -> str:
    """The text of ``path``, or one sentence of class ``error`` that says why it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise error(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise error(f"{path} is a directory; give a file") from None
    except UnicodeDecodeError:
        raise error(f"{path} is no text in UTF-8; give a text file, not a binary one") from None
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror}; check the path and its permissions") from None
    except ValueError:  # a path with a null byte
        raise error(f"{shown(str(path))} cannot be read: it is no path; check it") from None


def is_file(text: str) -> bool:
    """Whether ``text`` is the path of a file; False too for what can be no path at all."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # a name that is too long
        return False


def parse_json(text: str, source: str, error: type[GalvatronError], remedy: str) -> Any:
    """The value that the JSON ``text`` holds.

    Raises:
        error: it is no JSON, nests too deeply, gives a key twice or has a number that is not finite or endless; the
            sentence begins with ``source`` and ends with ``remedy``.
    """
    try:
        data = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_once)
        if _SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False).encode("utf-8")  # half a character cannot be written again
    except (ValueError, RecursionError) as failure:
        raise error(f"{source} is not JSON ({_reason(failure)}); {remedy}") from None
    return data


def parse_toml(text: str, source: str, error: type[GalvatronError]) -> dict[str, Any]:
    """The table that the TOML ``text`` holds; raises ``error`` where it is none."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as failure:
        raise error(f"{source} is not TOML: {_reason(failure)}; mend that line") from None


def _reason(failure: Exception) -> str:
    if isinstance(failure, RecursionError):
        return "it nests too deeply"
    if "integer string conversion" in str(failure):
        return "a number has thousands of digits"
    if isinstance(failure, UnicodeEncodeError):
        return "a text has half a character"
    return str(failure)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{shown(text)} is too large a number")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {shown(twice)} is given twice")
    return data
