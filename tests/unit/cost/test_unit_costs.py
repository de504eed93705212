"""Seconds and bytes of one unit against closed forms."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from galvatron.core.errors import ProfileError
from galvatron.core.hardware import Overlap
from galvatron.core.model import ParameterSpec, Precision
from galvatron.cost import Setting, unit_memory, unit_times
from galvatron.cost.communication import overlapped_s, redistribution_s, tied_reduction_s, transfer_s
from galvatron.cost.compute import interpolate
from galvatron.cost.outside import COMMUNICATORS, runtime_bytes, usable_bytes
from galvatron.cost.sizes import ShardSize, shard_sizes
from galvatron.cost.strategies import Strategies
from galvatron.plan.plan import LayerStrategy
from unit.profiles import AGAIN, make_hardware, make_model, make_spec

S, H, V = 64, 64, 250


def setting(world: int = 4, pp: int = 1, m: int = 1, batch: int = 16, device: str = "cpu", **spec: Any) -> Setting:
    model = make_model(make_spec(**spec))
    return Setting(model, make_hardware(world, device), pp, m, batch, S, "fp32", "fp32")


def shard_size(parameters: Iterable[ParameterSpec], tp: int, shard: int) -> ShardSize:
    strategy = LayerStrategy.model_validate({"tp": tp, "dp_shard": shard, "zero": 3 * (shard > 1)})
    return shard_sizes(parameters, Strategies.of([strategy]))[0]


def test_compute_is_piecewise_linear_and_goes_on_with_the_last_slope() -> None:
    points = [(1, 1.0), (2, 1.5), (4, 3.5)]
    assert [interpolate(points, b) for b in (1, 2, 3, 4, 6)] == [1.0, 1.5, 2.5, 3.5, 5.5]
    assert interpolate([(2, 1.0)], 8) == 4.0
    assert interpolate([(2, 1.0), (4, 1.8)], 1) == pytest.approx(0.6)  # 0.2 s whatever the batch, 0.4 s a sequence
    assert interpolate([(2, 1.0), (4, 3.0)], 1) == 0.5  # no time at all for an empty batch, never less
    assert interpolate([(1, 1.0), (2, 0.9)], 8) == pytest.approx(0.9)  # noise never makes more work faster


def test_overlap_of_equal_and_unlike_durations() -> None:
    slowed = Overlap(compute_slowdown=1.25, communication_slowdown=2.0)
    # communication 1 s alone takes 2 s, in which compute does 1.6 s of its 4; 2.4 s are left
    assert overlapped_s(4.0, 1.0, slowed) == pytest.approx(2.0 + 2.4)
    # compute 1 s takes 1.25 s, in which communication does 0.625 s of its 4
    assert overlapped_s(1.0, 4.0, slowed) == pytest.approx(1.25 + 3.375)
    assert overlapped_s(3.0, 0.0, slowed) == 3.0
    assert overlapped_s(3.0, 2.0, Overlap(compute_slowdown=1, communication_slowdown=1)) == 3.0


def test_tensor_parallel_collectives_of_a_layer() -> None:
    case = setting()
    times = unit_times(case, "layer", LayerStrategy(tp=2, dp_replicate=2, recompute="full"))
    hidden = 8 * S * H * 4
    gather, scatter = (case.link(op, 2, 1).time_s(hidden) for op in ("all_gather", "reduce_scatter"))
    region = gather + scatter
    assert times.tensor_parallel_forward_s == pytest.approx(2 * region)
    assert times.tensor_parallel_backward_s == pytest.approx(2 * region)
    # the layer's own output is not needed again
    assert times.recompute_s == pytest.approx(times.compute_forward_s + 2 * gather + scatter)
    for level, share in AGAIN.items():  # they keep what ranks have summed
        partly = unit_times(case, "layer", LayerStrategy(tp=2, dp_replicate=2, recompute=level))
        assert partly.recompute_s == pytest.approx(share * times.compute_forward_s + 2 * gather)
    assert times.replicated_s == pytest.approx(2 * H * 4 * case.link("all_reduce", 2, 1).seconds_per_byte)


def test_a_layer_alone_communicates_nothing() -> None:
    times = unit_times(setting(world=1), "layer", LayerStrategy())
    assert times.forward_s == times.compute_forward_s
    assert times.backward_s == times.compute_backward_s
    assert times.first_s == times.last_s == times.replicated_s == times.tied_s == 0


@pytest.mark.parametrize(("zero", "gathers", "scatters"), [(1, 0, 0), (2, 0, 1), (3, 2, 1)])
def test_what_every_zero_stage_does_a_microbatch_and_a_step(zero: int, gathers: int, scatters: int) -> None:
    case = setting(m=2)
    strategy = LayerStrategy.model_validate({"dp_shard": 4, "zero": zero})
    times = unit_times(case, "layer", strategy)
    padded = 4 * 4 * shard_size(case.model.spec.layer.parameters, 1, 4).held
    gather_s, scatter_s = (case.link(op, 4, 1).time_s(padded) for op in ("all_gather", "reduce_scatter"))
    every = times.data_parallel_forward_s + times.data_parallel_backward_s
    assert every == pytest.approx(gathers * gather_s + scatters * scatter_s)
    once = times.first_s + times.last_s
    assert once == pytest.approx((0 if zero == 3 else gather_s) + (0 if zero >= 2 else scatter_s))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_zero_3_gathers_ends_once_where_one_gather_serves_both_directions(schedule: str, m: int, tied: bool) -> None:
    case = replace(setting(m=m, tied=tied), schedule=schedule)
    for unit in ("embedding", "head"):
        held = shard_sizes(case.parameters(unit), Strategies.of([LayerStrategy(dp_shard=4, zero=3)]))[0].held
        if held == 0:
            continue
        times = unit_times(case, unit, LayerStrategy(dp_shard=4, zero=3))
        # of a projection whose gradient comes with the last backward, every backward reduces the norm alone
        late = shard_sizes(case.arriving_last(unit), Strategies.of([LayerStrategy(dp_shard=4, zero=3)]))[0].held
        assert (late > 0) == ((schedule, m) == ("gpipe", 2) and unit == "head" and not tied)
        gather, scatter = case.link("all_gather", 4, 1), case.link("reduce_scatter", 4, 1)
        joins = tied and unit == "head"  # its bytes travel with the embedding's
        gather_s = gather.time_s(16 * held) - joins * gather.latency_s
        scatter_s = scatter.time_s(16 * (held - late)) - joins * scatter.latency_s
        again = (schedule, m) == ("gpipe", 2) and (unit == "head" or tied)
        assert times.data_parallel_forward_s == pytest.approx(gather_s)
        assert times.data_parallel_backward_s == pytest.approx(scatter_s + again * gather_s)


def test_replicas_reduce_their_shard_once_a_step() -> None:
    case = setting()
    held = shard_size(case.model.spec.layer.parameters, 1, 2).held
    times = unit_times(case, "layer", LayerStrategy(dp_shard=2, dp_replicate=2, zero=3))
    assert times.last_s + times.delayed_s == pytest.approx(case.link("all_reduce", 2, 2).time_s(held * 4))


def test_on_cuda_gathers_hide_behind_compute_and_never_cost_more_than_in_series() -> None:
    strategy = LayerStrategy(dp_shard=4, zero=3)
    cpu, cuda = (unit_times(setting(device=device), "layer", strategy) for device in ("cpu", "cuda"))
    assert 0 < cuda.data_parallel_forward_s < cpu.data_parallel_forward_s
    assert cuda.forward_s < cpu.forward_s


def test_redistribution_moves_all_a_rank_holds_over_the_axes_between() -> None:
    case = setting()
    local = 16 * S * H * 4 // 4
    assert redistribution_s(case, "layer", 2, 2) == 0
    assert redistribution_s(case, "layer", 1, 4) == pytest.approx(case.link("all_to_all", 4, 1).time_s(local))
    assert redistribution_s(case, "layer", 4, 2) == pytest.approx(case.link("all_to_all", 2, 2).time_s(local))


def test_transfers_between_stages() -> None:
    case = setting(pp=2, m=4)
    assert transfer_s(case, "layer") == pytest.approx(case.link("p2p", 2, 2).time_s(4 * S * H * 4 // 2))
    assert transfer_s(setting(), "layer") == 0


def test_tied_copies_are_summed_between_the_ends_alone() -> None:
    for pp in (2, 4):
        case = setting(pp=pp, tied=True)
        strategy = LayerStrategy(dp_replicate=4 // pp)
        assert unit_times(case, "embedding", strategy).tied_s == pytest.approx(tied_reduction_s(case, V * H * 4))
        assert unit_times(case, "layer", strategy).tied_s == 0
    assert unit_times(setting(tied=True), "head", LayerStrategy(dp_replicate=4)).tied_s == 0


def test_held_bytes_by_hand() -> None:
    # 250 rows over tp 2 are 125, over 2 shards 63 (one padded); 64 columns
    memory = unit_memory(setting(), "embedding", LayerStrategy(tp=2, dp_shard=2, zero=3))
    assert memory.parameter_bytes == memory.gradient_bytes == 63 * 64 * 4
    assert memory.optimizer_bytes == 2 * 63 * 64 * 4
    assert memory.unsharded_bytes == 0


def test_kv_heads_fewer_than_tp_stay_whole() -> None:
    parameters = [p for p in make_spec(kv_heads=2).layer.parameters if p.name in ("q", "k")]
    assert shard_size(parameters, 4, 1).held == 64 * 64 // 4 + 2 * 8 * 64
    assert shard_size(parameters, 4, 1).uncut == 2 * 8 * 64
    assert shard_size(parameters, 2, 1).uncut == 0


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_what_stays_unsharded(zero: int, m: int) -> None:
    case = setting(m=m)
    shard = {"dp_replicate": 4} if zero == 0 else {"dp_shard": 4, "zero": zero}
    memory = unit_memory(case, "layer", LayerStrategy.model_validate(shard))
    whole = 4 * sum(math.prod(p.shape) for p in case.model.spec.layer.parameters)
    gathered = 0 if zero in (0, 3) else whole
    waiting = whole - memory.gradient_bytes if zero < 2 and m > 1 else 0
    assert memory.unsharded_bytes == gathered + waiting
    assert memory.parameter_bytes == (whole if zero == 0 else whole // 4)


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize(
    ("precision", "reduce", "per_parameter"),
    [("fp32", "fp32", 8), ("bf16", "fp32", 10), ("fp16", "fp32", 10), ("bf16", "bf16", 10)],
)
def test_unsharded_parameters_take_eight_bytes_or_ten_before_the_optimizer(
    precision: Precision, reduce: Precision, per_parameter: int, m: int
) -> None:
    model = make_model(make_spec()).model_copy(update={"precision": precision})
    case = Setting(model, make_hardware(4), 1, m, 16, S, precision, reduce)
    memory = unit_memory(case, "layer", LayerStrategy(dp_replicate=4))
    parameters = sum(math.prod(p.shape) for p in case.model.spec.layer.parameters)
    assert memory.resident_bytes - memory.optimizer_bytes == per_parameter * parameters


def test_activations_scale_with_the_local_batch() -> None:
    sample = setting().activation_sample("layer", 1, "none")
    for strategy, batch in ((LayerStrategy(dp_replicate=4), 4), (LayerStrategy(tp=4), 16)):
        memory = unit_memory(setting(), "layer", strategy)
        own = setting().activation_sample("layer", strategy.tp, "none")
        assert memory.activation_bytes == own.fixed_bytes + batch * own.bytes_per_sequence
    full = unit_memory(setting(), "layer", LayerStrategy(dp_replicate=4, recompute="full"))
    assert full.activation_bytes < 4 * sample.bytes_per_sequence


@pytest.mark.parametrize("m", [1, 4])
def test_the_largest_transient_by_hand(m: int) -> None:
    case = setting(m=m)
    whole = 4 * sum(math.prod(p.shape) for p in case.model.spec.layer.parameters)
    workspace = 16 // m // 4 * case.activation_sample("layer", 1, "none").workspace_bytes_per_sequence
    passing = max(workspace, whole // 4)
    sharded = unit_memory(case, "layer", LayerStrategy(dp_shard=4, zero=3))
    # gathered parameters, the flat buffers of gathering and reducing, new gradients
    assert sharded.transient_bytes == whole + whole + whole + whole + passing
    copied = unit_memory(case, "layer", LayerStrategy(dp_replicate=4))
    largest = 4 * max(math.prod(p.shape) for p in case.model.spec.layer.parameters)
    assert copied.transient_bytes == largest + workspace


def test_a_shared_tied_weight_counts_once_and_a_copied_one_twice() -> None:
    strategy = LayerStrategy(dp_replicate=4)
    shared = unit_memory(setting(tied=True), "head", strategy)
    assert shared.parameter_bytes == H * 4  # the norm alone
    copied = unit_memory(setting(tied=True, pp=2), "head", LayerStrategy(dp_replicate=2))
    assert copied.parameter_bytes == (H + V * H) * 4


def test_usable_and_runtime_bytes_are_inverse() -> None:
    case = setting(device="cuda")
    limit = 80 * 10**9
    tensors = usable_bytes(case, limit)
    assert limit - 2 <= tensors + runtime_bytes(case, tensors) <= limit
    assert usable_bytes(setting(), limit) == limit


def test_measured_context_communicators_and_slack_take_the_place_of_what_is_assumed() -> None:
    case = setting(device="cuda")
    assert case.hardware.world_size > 1
    measured = case.model.model_copy(update={"context_bytes": 10**9, "allocator_slack_fraction": 0.5})
    assert runtime_bytes(replace(case, model=measured), 100) == 10**9 + 50
    device = case.hardware.device.model_copy(update={"communicator_bytes": 10**8})
    hardware = case.hardware.model_copy(update={"device": device})
    case = replace(case, model=measured, hardware=hardware)
    assert runtime_bytes(case, 100) == 10**9 + COMMUNICATORS * 10**8 + 50
    assert usable_bytes(case, 80 * 10**9) == int((79 * 10**9 - COMMUNICATORS * 10**8) / 1.5)
    alone = hardware.model_copy(update={"world_size": 1})
    assert runtime_bytes(replace(case, hardware=alone), 100) == 10**9 + 50


def test_missing_measurements_are_profile_errors() -> None:
    case = setting(world=8)
    few = Setting(make_model(tps=(1,)), case.hardware, 1, 1, 16, S, "fp32", "fp32")
    with pytest.raises(ProfileError, match="no compute time of the layer at tp=2"):
        unit_times(few, "layer", LayerStrategy(tp=2, dp_replicate=4))
    with pytest.raises(ProfileError, match="no activation bytes of the layer at tp=2"):
        unit_memory(few, "layer", LayerStrategy(tp=2, dp_replicate=4))
    with pytest.raises(ProfileError, match="measured at seq_len=64 but the job has seq_len=128"):
        Setting(case.model, case.hardware, 1, 1, 16, 128, "fp32", "fp32")
    bare = Setting(case.model, case.hardware.model_copy(update={"links": ()}), 1, 1, 16, S, "fp32", "fp32")
    with pytest.raises(ProfileError, match="no all_gather over groups of size=4, stride=1"):
        unit_times(bare, "layer", LayerStrategy(tp=4, dp_replicate=2))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_offloaded_moments_leave_the_device_and_travel_at_the_update(device: str) -> None:
    rate, elements = 4e9, make_spec().layer.num_parameters // 4
    case = replace(setting(device=device), hardware=make_hardware(4, device, host_bytes_per_s=rate))
    plain = LayerStrategy(dp_shard=4, zero=3)
    hosted = plain.model_copy(update={"offload": "optimizer"})
    before, after = (unit_memory(case, "layer", strategy) for strategy in (plain, hosted))
    assert (before.optimizer_bytes, after.optimizer_bytes) == (8 * elements, 0)
    assert after.transient_bytes == max(int(before.transient_bytes), 3 * 8 * elements)
    update_s, travel_s = elements * case.model.optimizer_s_per_parameter, 8 * elements / rate
    assert unit_times(case, "layer", plain).optimizer_s == pytest.approx(update_s)
    expected = max(update_s, travel_s) if device == "cuda" else update_s + travel_s
    assert unit_times(case, "layer", hosted).optimizer_s == pytest.approx(expected)
    with pytest.raises(ProfileError, match="host_bytes_per_s"):
        unit_times(setting(device=device), "layer", hosted)


def test_on_cuda_tokens_travel_to_experts_while_shared_ones_compute() -> None:
    """What is beside hides the dispatch, forward and backward; not the way home, nor what is beside nothing."""

    def exposed(device: str, beside: str | None) -> tuple[float, float]:
        case = setting(device=device)
        own = case.model.spec.layer
        named = tuple(p.model_copy(update={"name": f"mlp.{p.name}"}) for p in own.parameters)
        experts = {"num_experts": 4, "experts_per_token": 2, "beside_experts": beside}
        layer = own.model_copy(update={"parameters": named, **experts})
        spec = case.model.spec.model_copy(update={"layers": (layer,)})
        case = replace(case, model=case.model.model_copy(update={"spec": spec}))
        times = unit_times(case, "layer", LayerStrategy(ep=4, dp_replicate=4))
        return float(times.expert_parallel_forward_s), float(times.expert_parallel_backward_s)

    for alone, shared in zip(exposed("cuda", None), exposed("cuda", "mlp"), strict=True):
        assert 0 < shared < 0.8 * alone
    assert exposed("cuda", "none.there") == pytest.approx(exposed("cuda", None))
    assert exposed("cpu", "mlp") == pytest.approx(exposed("cpu", None))
