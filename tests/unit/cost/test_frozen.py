"""What is frozen has no gradient, optimizer or reduction, and no backward below the first trained parameter."""

from __future__ import annotations

import numpy as np
import pytest
from tests.unit.profiles import make_hardware, make_model

from galvatron.core.model_profile import ModelProfile
from galvatron.cost.memory import unit_memory
from galvatron.cost.setting import Setting
from galvatron.cost.unit import UnitTimes, unit_times
from galvatron.plan import LayerStrategy

SHARDED = LayerStrategy(dp_shard=4, zero=3, recompute="full")


def setting(model: ModelProfile) -> Setting:
    return Setting(model, make_hardware(4), 1, 2, 16, model.seq_len, "fp32", "fp32")


def frozen(model: ModelProfile, *units: str) -> ModelProfile:
    """The same profile with every parameter of ``units`` frozen: what was measured stays as it is."""

    def freeze(unit):
        return unit.model_copy(
            update={"parameters": tuple(p.model_copy(update={"trainable": False}) for p in unit.parameters)}
        )

    spec = model.spec
    ends = {name: freeze(spec.unit(name)) for name in ("embedding", "head") if name in units}
    layers = tuple(freeze(kind) if kind.name in units else kind for kind in spec.layers)
    return model.model_copy(update={"spec": spec.model_copy(update={**ends, "layers": layers})})


def seconds(times: UnitTimes, *names: str) -> list[float]:
    return [float(getattr(times, name)) for name in names]


def test_a_frozen_layer_between_trained_ones_holds_and_gathers_its_parameters_alone() -> None:
    model = make_model()
    whole, alone = setting(model), setting(frozen(model, "layer"))
    before, after = unit_memory(whole, "layer", SHARDED), unit_memory(alone, "layer", SHARDED)
    assert after.parameter_bytes == before.parameter_bytes > 0
    assert after.activation_bytes == before.activation_bytes
    assert after.gradient_bytes == after.optimizer_bytes == 0
    assert after.transient_bytes < before.transient_bytes
    times, free = unit_times(whole, "layer", SHARDED), unit_times(alone, "layer", SHARDED)
    assert seconds(free, "optimizer_s", "last_s", "replicated_s") == [0, 0, 0]
    assert seconds(free, "data_parallel_forward_s", "recompute_s") == seconds(
        times, "data_parallel_forward_s", "recompute_s"
    )
    assert 0 < free.data_parallel_backward_s < times.data_parallel_backward_s  # gathered again, not reduced


def test_below_the_first_trained_parameter_nothing_runs_backward() -> None:
    model = make_model()
    lower = setting(frozen(model, "embedding", "layer"))
    for strategy in (SHARDED, LayerStrategy(tp=4)):
        times = unit_times(lower, "layer", strategy)
        backward = seconds(times, "tensor_parallel_backward_s", "recompute_s", "data_parallel_backward_s", "last_s")
        assert backward == [0, 0, 0, 0]
        assert times.forward_s == unit_times(setting(model), "layer", strategy).forward_s


def test_zero_below_3_keeps_no_whole_gradients_of_what_is_frozen() -> None:
    strategy = LayerStrategy(dp_replicate=4)
    model = make_model()
    memory = unit_memory(setting(frozen(model, "layer")), "layer", strategy)
    assert memory.gradient_bytes == 0
    assert memory.unsharded_bytes == 0


@pytest.mark.parametrize("units", [("head",), ("embedding", "head")])
def test_frozen_ends_are_not_updated(units: tuple[str, ...]) -> None:
    case = setting(frozen(make_model(), *units))
    for unit in units:
        assert unit_times(case, unit, LayerStrategy(dp_replicate=4)).optimizer_s == 0
    assert np.all(unit_times(case, "layer", LayerStrategy(dp_replicate=4)).optimizer_s > 0)
