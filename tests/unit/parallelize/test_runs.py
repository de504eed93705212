"""Where a rank's runs of tokens come among a microbatch's, and how many choices an expert takes."""

from __future__ import annotations

import pytest

from galvatron.parallelize.layers.capacity import _places, choices_taken
from galvatron.plan.axes import StageAxes


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("devices", [4, 6, 8, 12])
def test_runs_come_in_the_order_of_their_tokens(devices: int, *, folded: bool) -> None:
    """Told by what every rank has of a microbatch, token by token."""
    axes, seq_len = StageAxes(devices), 2 * devices
    for degree in axes.degrees[1:]:
        rows, pieces = 2, 1 + folded
        places: dict[int, list[int]] = {}
        for rank in range(devices):
            own = [position for span in axes.spans(rank, 1, degree, seq_len, folded=folded) for position in span]
            first, length = axes.batch_chunk(rank, degree) * rows, seq_len // (degree * pieces)
            tokens = [row * seq_len + position for row in range(first, first + rows) for position in own]
            for run, place in enumerate(_places(rank, axes, degree, rows, pieces)):
                places[place] = tokens[run * length : (run + 1) * length]
        in_order = [token for place in range(len(places)) for token in places[place]]
        assert in_order == list(range(rows * devices // degree * seq_len))


def test_a_capacity_is_that_of_the_number_as_it_is_written() -> None:
    assert choices_taken(1.1, 1000, 4, 4) == 1100  # 1.1 * 1000 in floating point is a little more
    assert choices_taken(0.07, 100, 1, 1) == 7
    assert choices_taken(1.25, 10, 2, 8) == 4
    assert choices_taken(1, 10, 1, 3) == 4
    assert choices_taken(1e-05, 10, 1, 3) == 1
