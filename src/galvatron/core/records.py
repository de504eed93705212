"""Frozen, validated records and the versioned JSON files that hold them.

A file is ``{"format": "galvatron.plan", "version": 1, ...}``.  Unknown keys are errors, writing is
atomic, and a malformed file is one sentence that names the key and the value.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ConfigError, GalvatronError

R = TypeVar("R", bound=BaseModel)


class Record(BaseModel):
    """A frozen value: compared and hashed by content, unknown keys rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class FileRecord(Record):
    """A record that is a file of its own, with a format name and a version."""

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int] = 1
    ERROR: ClassVar[type[GalvatronError]] = ConfigError

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and validate ``path``; raises ``cls.ERROR`` with one sentence on any defect."""
        return cls.from_json(read_text(path, cls.ERROR), source=str(path))

    @classmethod
    def from_json(cls, text: str, source: str = "text") -> Self:
        """Parse the JSON ``text`` of a file; ``source`` names it in error messages."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise cls.ERROR(f"{source} is not JSON ({error}); write it anew with galvatron") from None
        if not isinstance(data, dict) or data.pop("format", None) != cls.FORMAT:
            raise cls.ERROR(f'{source} lacks "format": "{cls.FORMAT}"; give a file of that format')
        version = data.pop("version", None)
        if version != cls.VERSION:
            raise cls.ERROR(f"{source} has version {version}; this galvatron reads version {cls.VERSION}")
        return validate(cls, data, source, cls.ERROR)

    def to_json(self) -> str:
        """The file's text: keys in declaration order, defaults left out, one trailing newline."""
        body = self.model_dump(mode="json", exclude_defaults=True)
        return dump_json({"format": self.FORMAT, "version": self.VERSION, **body})

    def save(self, path: str | Path) -> None:
        """Write the file atomically: readers see the old text or the new, never a part."""
        write_atomic(path, self.to_json())


def validate(cls: type[R], data: Any, source: str, error: type[GalvatronError]) -> R:
    """``cls.model_validate`` whose first defect becomes one sentence of class ``error``."""
    try:
        return cls.model_validate(data)
    except ValidationError as failure:
        first = failure.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = ", ".join(_known_keys(cls, first["loc"]))
            reason = f"unknown key; known here: {known}" if known else "unknown key; remove it"
        got = "" if isinstance(first["input"], (dict, list)) else f" (got {first['input']!r})"
        raise error(f"{source}: {where}: {reason}{got}") from None


def _known_keys(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    model: Any = cls
    for part in loc[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        model = getattr(field, "annotation", None)
    return sorted(getattr(model, "model_fields", {}))


def read_text(path: str | Path, error: type[GalvatronError]) -> str:
    """The text of ``path``, or one sentence of class ``error`` that says why it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise error(f"{path} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError) as failure:
        raise error(f"{path} cannot be read: {failure}") from None


def dump_json(data: Any) -> str:
    """Indented JSON with a trailing newline; non-finite numbers are our own bug."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_atomic(path: str | Path, text: str) -> None:
    """Write ``text`` beside ``path``, then rename over it; parent folders are made, permissions are the user's own."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
