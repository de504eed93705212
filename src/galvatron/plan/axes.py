"""Rank arithmetic: a stage's devices as prime axes, a strategy as roles of those axes.

A stage of n devices has one axis for every prime factor of n; the innermost (fastest links) changes
fastest with the rank.  A strategy's degrees take axes from the inside out in the order tp, ulysses, cp,
dp_shard, dp_replicate.  Between layers a rank holds hidden states cut

* along the sequence by its tp, ulysses and cp axes, the *innermost* axis being the coarsest cut, and
* along the batch by its dp axes, the *outermost* axis being the coarsest cut.

With these two orders a change of strategy is one all-to-all over just the axes that change role
(``between``): their ranks together hold the same tokens before and after.

A *folded* sequence is cut likewise, but each chunk i of n is two: positions i / 2n ... (i + 1) / 2n, then as many
from the end.  Whatever the degree, all chunks of it then see equally many positions before them in total, which
balances the ranks of a ring under causal attention (zigzag, as in Llama 3: Dubey et al. 2024, 3.3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from galvatron.core.errors import PlanError


def prime_factors(n: int) -> tuple[int, ...]:
    """Prime factors, largest first: 12 → (3, 2, 2)."""
    factors, divisor = [], 2
    while n > 1:
        while n % divisor == 0:
            factors.append(divisor)
            n //= divisor
        divisor += 1
    return tuple(reversed(factors))


@dataclass(frozen=True)
class StageAxes:
    """The prime axes of a pipeline stage with ``num_devices`` devices."""

    num_devices: int

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Axis sizes, outermost first."""
        return prime_factors(self.num_devices)

    @cached_property
    def degrees(self) -> tuple[int, ...]:
        """Products of innermost axes, ascending from 1: the degrees a strategy may stack from the inside."""
        products = [1]
        for size in reversed(self.sizes):
            products.append(products[-1] * size)
        return tuple(products)

    def digits(self, rank: int) -> tuple[int, ...]:
        """A stage rank's coordinate on every axis, innermost first."""
        digits = []
        for size in reversed(self.sizes):
            digits.append(rank % size)
            rank //= size
        return tuple(digits)

    def axes_between(self, inner: int, outer: int) -> tuple[int, ...]:
        """Sizes, innermost first, of the axes that multiply degree ``inner`` up to ``outer``.

        Raises:
            PlanError: ``inner`` or ``outer`` is no product of innermost axes.
        """
        for degree in (inner, outer):
            if degree not in self.degrees:
                raise PlanError(
                    f"degrees stacked from the inside must be products of a stage's innermost axes "
                    f"{self.sizes[::-1]}, got {degree}; choose from {', '.join(map(str, self.degrees))}"
                )
        low, high = self.degrees.index(inner), self.degrees.index(outer)
        return self.sizes[::-1][low:high]

    def sequence_chunk(self, rank: int, degree: int) -> int:
        """Which of ``degree`` equal sequence chunks stage rank ``rank`` holds (innermost axis coarsest)."""
        chunk = 0
        for size, digit in zip(self.axes_between(1, degree), self.digits(rank), strict=False):
            chunk = chunk * size + digit
        return chunk

    def spans(self, rank: int, gathered: int, degree: int, seq_len: int, *, folded: bool) -> tuple[range, ...]:
        """The positions, ascending, of what is cut ``degree`` ways once the inner ``gathered`` of them are gathered."""
        chunks = sorted(self.sequence_chunk(other, degree) for other in self.group(rank, 1, gathered))
        if folded:
            chunks += [2 * degree - 1 - chunk for chunk in reversed(chunks)]
        width = seq_len // (2 * degree if folded else degree)
        return _joined([range(chunk * width, (chunk + 1) * width) for chunk in chunks])

    def batch_chunk(self, rank: int, sequence_degree: int) -> int:
        """Which of n / ``sequence_degree`` equal batch chunks the rank holds (outermost axis coarsest)."""
        return rank // sequence_degree

    def group(self, rank: int, inner: int, outer: int) -> tuple[int, ...]:
        """The stage ranks that differ from ``rank`` only on the axes between two stacked degrees, ascending."""
        base = rank - (rank % outer) + rank % inner
        return tuple(base + i * inner for i in range(outer // inner))

    def groups(self, inner: int, outer: int) -> Iterator[tuple[int, ...]]:
        """Every group of the axes between ``inner`` and ``outer``."""
        for rank in range(self.num_devices):
            group = self.group(rank, inner, outer)
            if group[0] == rank:
                yield group


def _joined(spans: list[range]) -> tuple[range, ...]:
    joined = spans[:1]
    for span in spans[1:]:
        if span.start == joined[-1].stop:
            joined[-1] = range(joined[-1].start, span.stop)
        else:
            joined.append(span)
    return tuple(joined)


def divisors(n: int) -> tuple[int, ...]:
    """All divisors of ``n``, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))
