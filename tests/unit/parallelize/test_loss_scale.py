"""The loss scale moves as PyTorch's own scaler does, within its bounds."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from galvatron.parallelize.losses.scale import BACKOFF, GROWTH, GROWTH_INTERVAL, LossScale


def test_it_moves_as_torchs_scaler_does() -> None:
    finite = [True] * 1999 + [False] + [True] * 2000 + [False, False] + [True] * 4001
    scale, tracker = torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
    ours = LossScale()
    for step in finite:
        found_inf = torch.tensor(0.0 if step else 1.0)
        torch._amp_update_scale_(scale, tracker, found_inf, GROWTH, BACKOFF, GROWTH_INTERVAL)
        ours = ours.after(finite=step)
        assert (ours.scale, ours.finite_steps) == (scale.item(), tracker.item())
    assert ours.scale == 2.0**16  # shrunk three times, grown three times


def test_it_stays_within_its_bounds() -> None:
    least = LossScale(scale=2.0).after(finite=False)
    assert least.is_least
    assert least.after(finite=False) == least
    most = LossScale(scale=2.0**32, finite_steps=GROWTH_INTERVAL - 1).after(finite=True)
    assert most.scale == 2.0**32
    for scale in (0.0, 0.5, 2.0**33, float("nan")):
        with pytest.raises(ValidationError):
            LossScale(scale=scale)
