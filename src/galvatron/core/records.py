"""Frozen, validated records and the versioned JSON files that hold them.

A file is ``{"format": "galvatron.plan", "version": 1, ...}``.  Unknown keys are errors, writing is
atomic, and a malformed file is one sentence that names the key and the value.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .defects import sentence
from .errors import ConfigError, GalvatronError
from .files import write_output
from .parsing import parse_json, read_text
from .words import shown

__all__ = ["FileRecord", "Record", "dump_json", "read_text", "validate"]

R = TypeVar("R", bound=BaseModel)


class Record(BaseModel):
    """A frozen value: compared and hashed by content; unknown keys and numbers that are not finite are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


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
        data = parse_json(text, source, cls.ERROR, "write it anew with galvatron")
        if not isinstance(data, dict) or data.pop("format", None) != cls.FORMAT:
            raise cls.ERROR(f'{source} lacks "format": "{cls.FORMAT}"; give a file of that format')
        version = data.pop("version", None)
        if type(version) is not int or version != cls.VERSION:
            raise cls.ERROR(
                f"{source} has version {shown(version)}; this galvatron reads version {cls.VERSION}: use the release "
                "that wrote it"
            )
        return validate(cls, data, source, cls.ERROR)

    def to_json(self) -> str:
        """The file's text: keys in declaration order, defaults left out, one trailing newline."""
        body = self.model_dump(mode="json", exclude_defaults=True)
        return dump_json({"format": self.FORMAT, "version": self.VERSION, **body})

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all; raises OutputError, which says where it was kept instead."""
        write_output(path, self.to_json())


def validate(cls: type[R], data: Any, source: str, error: type[GalvatronError]) -> R:
    """``cls.model_validate`` whose defects become one sentence of class ``error``."""
    try:
        return cls.model_validate(data)
    except ValidationError as failure:
        raise error(f"{source}: {sentence(cls, failure)}") from None


def dump_json(data: Any) -> str:
    """Indented JSON with a trailing newline; non-finite numbers are our own bug."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
