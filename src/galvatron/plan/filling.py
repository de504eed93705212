"""Sequences of patches, whose number nobody chooses (197, 257 and 577 are primes): filled up where they are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from galvatron.core.model import LayerKind, ModelSpec

from .plan import Plan


@dataclass(frozen=True)
class Filling:
    """Sequences of ``tokens`` that are cut as if they had ``filled``, fewer than twice as many.

    What is local may end with fillers, which begin as copies of the last token and get no gradient; what is whole never
    does.
    """

    tokens: int
    filled: int

    @classmethod
    def up(cls, tokens: int, degree: int) -> Self:
        """``tokens`` and what fills them up to a multiple of ``degree``."""
        return cls(tokens, -(-tokens // degree) * degree)

    def local(self, degree: int) -> int:
        """Tokens of a sequence, fillers too, that a rank has of ``degree`` parts."""
        return self.tokens if degree == 1 else self.filled // degree


def filling_of(plan: Plan, spec: ModelSpec, kind: LayerKind) -> Filling | None:
    """What fills sequences in layers of ``kind`` up to a multiple of whatever cuts them; None if they have no patches.

    Between layers only chunks move, so all layers that see as many tokens, and the ends, fill them up alike.
    """
    tokens = spec.patches(kind, plan.seq_len)
    cut = [
        s for s, k in zip(plan.layers, spec.kind_of_layers(), strict=True) if spec.patches(k, plan.seq_len) == tokens
    ]
    most = max(strategy.sequence_degree for strategy in (plan.embedding, *cut, plan.head))
    return Filling.up(tokens, most) if tokens else None
