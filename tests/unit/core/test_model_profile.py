from __future__ import annotations

import pytest

from galvatron.core.errors import ProfileError
from galvatron.core.model import RECOMPUTES
from galvatron.core.model_profile import ModelProfile
from unit.profiles import AGAIN, make_model

MODEL = make_model()


def test_every_level_of_recompute_has_bytes_and_seconds() -> None:
    again = ModelProfile.from_json(MODEL.to_json())
    assert again == MODEL
    layer = next(sample for sample in again.compute if sample.unit == "layer")
    shares = [layer.recompute_s(level) / layer.forward_s for level in RECOMPUTES]
    assert shares == pytest.approx([0.0, *AGAIN.values(), 1.0])  # full was not measured: the whole forward


def test_a_level_that_was_counted_and_not_timed_is_refused() -> None:
    untimed = [s.model_copy(update={"again_s": {"selective": 1e-3}}) if s.tp == 2 else s for s in MODEL.compute]
    text = MODEL.model_copy(update={"compute": tuple(untimed)}).to_json()
    with pytest.raises(ProfileError, match="recompute=mlp of the layer at tp=2 has bytes but no seconds"):
        ModelProfile.from_json(text)


def test_profiles_of_fewer_levels_are_refused_by_their_version() -> None:
    text = MODEL.to_json().replace('"version": 4', '"version": 3')
    with pytest.raises(ProfileError, match="has version 3; this galvatron reads version 4"):
        ModelProfile.from_json(text)
