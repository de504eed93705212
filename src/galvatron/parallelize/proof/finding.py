"""What is found wrong with a way to run a model: of which kind, by what rule, and what was seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from galvatron.core.errors import GalvatronError, UnfitError
from galvatron.models.failures import said

Kind = Literal["fails", "differs", "unfit"]
"""It ends in an error; it computes something else; or a rule says that it cannot be."""


@dataclass(frozen=True)
class Finding:
    """As a string, what is told of it.

    Attributes:
        rule: the same for all types that it holds for; "" where the kind says it.
        detail: what was seen of this one.
    """

    kind: Kind
    rule: str = ""
    detail: str = ""

    @classmethod
    def of(cls, failure: Exception) -> Finding:
        """What an error says."""
        if isinstance(failure, UnfitError):
            return cls("unfit", failure.rule, failure.detail)
        if isinstance(failure, GalvatronError):
            return cls("unfit", said(failure))
        return cls("fails", detail=said(failure))

    def __str__(self) -> str:
        if self.kind == "fails":
            return f"it fails with {self.detail}"
        if self.kind == "differs":
            return f"{self.rule}: {self.detail}" if self.rule else self.detail
        return f"{self.rule} ({self.detail})" if self.detail else self.rule
