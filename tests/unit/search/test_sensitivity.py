"""Changes of the cluster are searched with what they change, and nothing else."""

from __future__ import annotations

from galvatron.core.errors import InfeasibleError
from galvatron.core.hardware import HardwareProfile
from galvatron.estimate import ClusterShape, estimate_model, model_spec
from galvatron.search import SearchResult, search, sensitivity, what_would_fit
from galvatron.search.result import seconds_per_sample
from galvatron.search.sensitivity import faster_network
from unit.profiles import make_hardware

SHAPE = ClusterShape.parse("a100:2x2", ("inter=1GB/s",))
GIB = 2**30


def again(hardware: HardwareProfile, memory_limit_bytes: int) -> SearchResult:
    model = estimate_model(model_spec("llama2-7b"), hardware.device, seq_len=512, tp_degrees=(1, 2, 4, 8))
    arguments = {"num_candidates": 1, "baselines": False}
    return search(model, hardware, global_batch_size=24, memory_limit_bytes=memory_limit_bytes, **arguments)


def test_memory_network_and_nodes_are_tried_one_by_one() -> None:
    asked: list[tuple[int, int]] = []

    def watched(hardware: HardwareProfile, memory_limit_bytes: int) -> SearchResult:
        asked.append((hardware.world_size, memory_limit_bytes))
        return again(hardware, memory_limit_bytes)

    limit = 31 * GIB
    before = again(SHAPE.profile(), limit).plan
    memory, network, node = sensitivity(watched, SHAPE.profile(), limit, SHAPE)
    assert asked == [(4, 39 * GIB), (4, limit), (6, limit)]
    assert node.words == "another node (6 devices)"
    for change in (memory, network, node):
        assert change.plan is not None
        assert seconds_per_sample(change.plan) < seconds_per_sample(before)


def test_where_nothing_divides_over_one_node_more_twice_the_nodes_are_tried() -> None:
    def only_powers_of_two(hardware: HardwareProfile, memory_limit_bytes: int) -> SearchResult:
        if hardware.world_size == 6:
            raise InfeasibleError("6 devices", constraint="divisibility")
        return again(hardware, memory_limit_bytes)

    *_, node, twice = sensitivity(only_powers_of_two, SHAPE.profile(), 40 * GIB, SHAPE)
    assert node.plan is None
    assert twice.words == "twice the nodes (8 devices)"
    assert twice.plan is not None


def test_a_measured_node_alone_has_no_network_and_no_further_nodes() -> None:
    (only,) = sensitivity(again, ClusterShape.parse("a100:1x4").profile(), 40 * GIB)
    assert only.words == "another 8 GiB a device"


def test_a_faster_network_is_faster_where_a_group_leaves_its_node() -> None:
    hardware = make_hardware(8).model_copy(update={"devices_per_node": 4})
    faster = faster_network(hardware, 2)
    for old, new in zip(hardware.links, faster.links, strict=True):
        reach = old.stride if old.op == "p2p" else (old.size - 1) * old.stride
        within = reach < 4 and (old.op == "p2p" or old.size * old.stride <= 4)
        assert new.seconds_per_byte == (old.seconds_per_byte if within else old.seconds_per_byte / 2)
        assert new.latency_s == old.latency_s
    assert faster.link("all_reduce", 8, 1).seconds_per_byte < hardware.link("all_reduce", 8, 1).seconds_per_byte


def test_the_smallest_cluster_on_which_a_plan_fits() -> None:
    small = SHAPE.with_nodes(1)
    assert what_would_fit(again, 40 * GIB, small) == small.with_nodes(2)
    assert what_would_fit(again, 2 * GIB, small) is None
