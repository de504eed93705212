"""What a state dict must be before anything of it is loaded."""

from __future__ import annotations

import pytest
import torch

from galvatron.core.errors import CheckpointError
from galvatron.parallelize.state.pieces import LocalParameter, Piece
from galvatron.parallelize.state.state import load_local_state, load_whole_state


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_state_that_is_not_finite_is_named_and_not_loaded(bad: float) -> None:
    part = LocalParameter("w", torch.nn.Parameter(torch.ones(2, 3)), (2, 3), (Piece((0, 0), (0, 0), (2, 3)),), 1, True)
    values = torch.zeros(2, 3)
    values[1, 2] = bad
    with pytest.raises(CheckpointError, match="weights of w hold NaN or inf"):
        load_whole_state([part], {"w": values}, {})
    with torch.no_grad(), pytest.raises(CheckpointError, match="weights of w@0,0 hold NaN or inf"):
        load_local_state([part], {"w@0,0": values})
    assert torch.equal(part.tensor, torch.ones(2, 3))
