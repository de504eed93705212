"""What experts with a capacity are costed at: shares of tokens by hand, and plans that take less."""

from __future__ import annotations

import pytest

from galvatron.core.errors import ConfigError
from galvatron.core.model_profile import ModelProfile
from galvatron.cost import Setting, unit_memory, unit_times
from galvatron.cost.capacity import kept
from galvatron.cost.sizes import expert_ranks
from galvatron.cost.strategies import Strategies
from galvatron.plan import LayerStrategy
from unit.profiles import make_hardware, make_model, make_spec

S = LayerStrategy
BATCH, SEQ_LEN = 16, 64


def setting(factor: float | None, model: ModelProfile | None = None) -> Setting:
    model = (model or make_model(make_spec(others=2), SEQ_LEN)).with_capacity(factor)
    return Setting(model, make_hardware(8), 1, 1, BATCH, SEQ_LEN, "fp32", "fp32")


@pytest.mark.parametrize(
    ("strategy", "own", "asked"),
    [
        (S(tp=8), 0.25, 0.25),  # one part of the batch
        (S(dp_replicate=8), 1.0, 1.0),  # the first two ranks' rows fill all experts
        (S(dp_replicate=2, tp=4), 0.5, 0.5),
        (S(dp_replicate=8, ep=8), 1.0, 0.25),  # experts are asked by all ranks
        (S(dp_replicate=8, ep=4), 1.0, 0.5),
        (S(ulysses=8, ep=8), 0.25, 0.25),
        (S(ulysses=2, dp_replicate=4, ep=4), 1.0, 0.5),
    ],
)
def test_the_first_ranks_fill_experts(strategy: LayerStrategy, own: float, asked: float) -> None:
    shares = kept(setting(0.25), "other", Strategies.of([strategy]))
    assert (shares.own[0], shares.asked[0]) == pytest.approx((own, asked))


@pytest.mark.parametrize("factor", [None, 1.0, 1.25])
def test_even_loads_fill_no_expert_of_more_than_their_size(factor: float | None) -> None:
    shares = kept(setting(factor), "other", Strategies.of([S(tp=8), S(dp_replicate=8, ep=8)]))
    assert shares.own.tolist() == shares.asked.tolist() == [1.0, 1.0]


def test_half_a_choice_is_a_whole_one() -> None:
    """ceil(0.3 x 16 x 64 x 2 / 4) = 154 of an expert's 512."""
    shares = kept(setting(0.3), "other", Strategies.of([S(tp=8)]))
    assert shares.own[0] == pytest.approx(154 / 512)


def test_what_is_dropped_takes_neither_time_nor_memory() -> None:
    model = make_model(make_spec(others=2), SEQ_LEN)
    counted = [s.model_copy(update={"expert_bytes_per_sequence": s.bytes_per_sequence // 2}) for s in model.activations]
    model = model.model_copy(update={"activations": tuple(counted)})
    strategy = S(ulysses=8, ep=4)
    full, half = (setting(factor, model) for factor in (None, 0.5))
    times, fewer = unit_times(full, "other", strategy), unit_times(half, "other", strategy)
    assert fewer.compute_forward_s < times.compute_forward_s
    assert fewer.expert_parallel_backward_s < times.expert_parallel_backward_s
    bytes_full, bytes_half = (int(unit_memory(s, "other", strategy).activation_bytes) for s in (full, half))
    within = full.activation_sample("other", 1, "none").expert_bytes_per_sequence
    sent = float(expert_ranks(full.model.spec.kind("other"), Strategies.of([strategy]))[0])
    indices = 2 * 8 * SEQ_LEN * (sent + 2)  # of a token's rows, and of its choices
    assert bytes_full - bytes_half == pytest.approx(BATCH / 8 / 2 * (within + indices), abs=2)
    assert unit_times(half, "layer", S(tp=8)).forward_s == unit_times(full, "layer", S(tp=8)).forward_s


def test_a_capacity_of_no_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="toy has none; leave capacity_factor out"):
        setting(1.25, make_model())
