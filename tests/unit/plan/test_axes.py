"""Rank arithmetic: axes of a stage, layouts and the groups between two strategies."""

from __future__ import annotations

import pytest

from galvatron.core.errors import PlanError
from galvatron.plan.axes import StageAxes, divisors, prime_factors


def test_prime_factors_are_largest_first() -> None:
    assert prime_factors(12) == (3, 2, 2)
    assert prime_factors(1) == ()
    assert divisors(12) == (1, 2, 3, 4, 6, 12)


@pytest.mark.parametrize("n", [1, 2, 6, 8, 12, 24])
def test_every_layout_cuts_the_tokens_into_disjoint_pieces(n: int) -> None:
    axes = StageAxes(n)
    for degree in axes.degrees:
        pieces = {(axes.batch_chunk(r, degree), axes.sequence_chunk(r, degree)) for r in range(n)}
        assert pieces == {(b, s) for b in range(n // degree) for s in range(degree)}


@pytest.mark.parametrize("n", [2, 6, 8, 12])
def test_a_group_between_two_degrees_holds_the_same_tokens_under_both(n: int) -> None:
    axes = StageAxes(n)

    def tokens(rank: int, degree: int) -> set[tuple[int, int]]:
        """The (batch, sequence) cells, on an n x n grid, that a rank holds."""
        batch, chunk = axes.batch_chunk(rank, degree), axes.sequence_chunk(rank, degree)
        rows, columns = degree, n // degree
        return {(batch * rows + i, chunk * columns + j) for i in range(rows) for j in range(columns)}

    for inner in axes.degrees:
        for outer in axes.degrees:
            if inner < outer:
                for group in axes.groups(inner, outer):
                    before = set.union(*(tokens(r, inner) for r in group))
                    assert before == set.union(*(tokens(r, outer) for r in group))


def test_a_degree_that_no_axes_make_is_refused() -> None:
    with pytest.raises(PlanError, match="choose from 1, 2, 6"):
        StageAxes(6).axes_between(1, 3)
