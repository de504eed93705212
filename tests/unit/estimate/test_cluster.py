from __future__ import annotations

import math
import time

import pytest

from galvatron.core.errors import ConfigError
from galvatron.core.hardware import OPS, HardwareProfile
from galvatron.estimate import DEVICES, ClusterShape, cluster
from galvatron.estimate.devices import preset, same_device
from galvatron.estimate.topology import START_S, Topology
from galvatron.plan.axes import divisors
from unit.profiles import _shapes

BASE = {
    "intra_bytes_per_s": 200e9,
    "intra_peer_bytes_per_s": 200e9,
    "intra_latency_s": 1e-6,
    "inter_bytes_per_s": 10e9,
    "inter_latency_s": 1e-5,
}


def _algorithm_bytes_per_s(profile: HardwareProfile, op: str, size: int, stride: int) -> float:
    return 1 / profile.link(op, size, stride).seconds_per_byte


@pytest.mark.parametrize("name", DEVICES)
def test_every_preset_makes_a_profile_that_survives_its_file(name):
    profile = cluster(f"{name}:2x8")
    assert HardwareProfile.from_json(profile.to_json()) == profile
    assert (profile.origin, profile.world_size, profile.devices_per_node) == ("estimated", 16, 8)
    assert profile.device.matmul_flops_per_s["bf16"] >= profile.device.matmul_flops_per_s["fp32"]


@pytest.mark.parametrize("text", ["h100:1", "h100:6", "h100:12", "a100:24", "l40s:8x12", "h100:3x5"])
def test_links_are_those_that_a_world_needs(text):
    profile = cluster(text)
    wanted = {
        (op, size or 2, stride)
        for size, stride in _shapes(profile.world_size)
        for op in OPS
        if (op == "p2p") == (size == 0)
    }
    assert {(link.op, link.size, link.stride) for link in profile.links} == wanted
    assert len(profile.links) == len(wanted)


@pytest.mark.parametrize(
    ("text", "nodes", "per_node"),
    [
        ("h100:16x8", 16, 8),
        ("H100:8", 1, 8),
        ("h100:6", 1, 6),
        ("h100:24", 3, 8),
        ("h100:12", 2, 6),
        ("h100:1x12", 1, 12),
    ],
)
def test_a_text_gives_nodes_and_devices(text, nodes, per_node):
    shape = ClusterShape.parse(text)
    assert (shape.nodes, shape.devices_per_node) == (nodes, per_node)
    assert shape.with_nodes(5).world_size == 5 * per_node
    assert shape.with_nodes(5).profile().world_size == 5 * per_node


@pytest.mark.parametrize("text", ["h100", "h100:", "h100:0x8", "h100:8x", "h100:-1", "8xh100", "h100:2x8x2"])
def test_a_text_that_is_no_cluster_is_refused(text):
    with pytest.raises(ConfigError, match="write h100:16x8"):
        cluster(text)


def test_an_unknown_device_lists_the_known():
    with pytest.raises(ConfigError, match=r"no device is called 'v100'; choose one of a100-40g, .*rtx4090"):
        cluster("v100:8")


@pytest.mark.parametrize(
    "link", ["inter", "inter=50", "inter=50us", "outer=5GB/s", "intra_latency=5GB/s", "inter=0GB/s"]
)
def test_an_unreadable_link_is_refused(link):
    with pytest.raises(ConfigError, match="write inter=50GB/s"):
        cluster("h100:2x8", [link])


def test_a_link_given_twice_is_refused():
    with pytest.raises(ConfigError, match="every link may be given once"):
        cluster("h100:2x8", ["inter=50GB/s", "inter=25GB/s"])


def test_overrides_are_line_rates_in_bits_or_bytes():
    default = cluster("h100:2x8")
    assert cluster("h100:2x8", ["inter=50GB/s", "intra=450GB/s"]).links == default.links
    assert cluster("h100:2x8", ["inter=400Gb/s"]).links == default.links
    slow = cluster("h100:2x8", ["inter=25GB/s", "inter_latency=1ms"]).link("p2p", 2, 8)
    assert slow.seconds_per_byte == pytest.approx(2 * default.link("p2p", 2, 8).seconds_per_byte)
    assert slow.latency_s == pytest.approx(START_S + 1e-3)


def test_closed_forms_within_and_between_nodes():
    links = {(link.op, link.size, link.stride): link for link in Topology(nodes=2, devices_per_node=8, **BASE).links()}
    ring = lambda size, bus: (size - 1) / size / bus  # noqa: E731
    assert links["all_gather", 8, 1].seconds_per_byte == pytest.approx(ring(8, 200e9))
    assert links["all_reduce", 8, 1].seconds_per_byte == pytest.approx(2 * ring(8, 200e9))
    assert links["reduce_scatter", 16, 1].seconds_per_byte == pytest.approx(ring(16, 8 * 10e9))  # eight adapters
    assert links["all_gather", 4, 4].seconds_per_byte == pytest.approx(ring(4, 2 * 10e9))  # two ranks a node
    assert links["all_gather", 2, 8].seconds_per_byte == pytest.approx(ring(2, 10e9))
    assert links["all_to_all", 16, 1].seconds_per_byte == pytest.approx(8 / 16 / 10e9)
    assert links["all_to_all", 8, 1].seconds_per_byte == pytest.approx(7 / 8 / 200e9)
    assert links["all_gather", 16, 1].latency_s == pytest.approx(START_S + 14 * 1e-6 + 1e-5)
    assert links["all_reduce", 16, 1].latency_s == pytest.approx(START_S + 2 * (7 * 1e-6 + 1e-5))
    assert links["all_gather", 2, 8].latency_s == pytest.approx(START_S + 1e-5)
    assert links["p2p", 2, 8].time_s(1e9) == pytest.approx(START_S + 1e-5 + 0.1)


@pytest.mark.parametrize("op", ["all_gather", "reduce_scatter"])
def test_the_latency_of_a_ring_grows_with_its_ranks(op):
    """3.4 µs a hop within a node, 14 µs between two: 2,048 ranks wait for some 10 ms before they have anything."""
    profile = cluster("h100:256x8")
    waits = {size: profile.link(op, size, 1).latency_s - START_S for size in (2, 8, 64, 512, 2048)}
    assert waits == pytest.approx(
        {2: 3.4e-6, 8: 7 * 3.4e-6, 64: 56 * 3.4e-6 + 7 * 14e-6, 512: 448 * 3.4e-6 + 63 * 14e-6, 2048: 9.6628e-3}
    )
    assert profile.link("all_reduce", 2048, 1).latency_s < 0.05 * waits[2048]


def test_devices_joined_pair_by_pair_need_more_peers_for_more_bandwidth():
    profile = cluster("mi300x:8")
    two, eight = (_algorithm_bytes_per_s(profile, "all_gather", n, 1) * (n - 1) / n for n in (2, 8))
    assert eight == pytest.approx(7 * two)


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 6), (2, 6), (4, 6), (3, 5), (2, 12), (4, 3), (5, 4), (9, 2)])
def test_members_of_a_node_equal_those_counted_rank_by_rank(nodes, per_node):
    topology = Topology(nodes=nodes, devices_per_node=per_node, **BASE)
    world = nodes * per_node
    for size in divisors(world)[1:]:
        for stride in divisors(world // size):
            counts = []
            for start in (block + i for block in range(0, world, size * stride) for i in range(stride)):
                homes = [(start + i * stride) // per_node for i in range(size)]
                counts += [homes.count(home) for home in set(homes)]
            found = topology.members_per_node(size, stride)
            assert found <= min(counts)
            # only between its first and last node may a group have more than is assumed
            assert found == min(counts) or (size * stride > 2 * per_node and per_node % stride)


@pytest.mark.parametrize("link", ["inter=100GB/s", "intra=900GB/s", "inter_latency=1us", "intra_latency=1us"])
@pytest.mark.parametrize("text", ["h100:4x8", "mi300x:2x6", "rtx4090:3x4"])
def test_a_better_link_is_never_slower(text, link):
    for before, after in zip(cluster(text).links, cluster(text, [link]).links, strict=True):
        for num_bytes in (0, 1e6, 1e9):
            assert after.time_s(num_bytes) <= before.time_s(num_bytes)


def test_more_ranks_in_nodes_of_any_size_never_have_less_latency():
    profile = cluster("h100:4x6")
    for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        latencies = [profile.link(op, size, 1).latency_s for size in (2, 4, 8, 24)]
        assert latencies == sorted(latencies)


def test_sixteen_thousand_devices_take_a_moment():
    cluster("h100:8")
    start = time.perf_counter()
    profile = cluster("h100:2048x8")
    assert time.perf_counter() - start < 0.3
    assert profile.world_size == 16384
    assert math.isfinite(sum(link.time_s(1e6) for link in profile.links))


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("a100-80gb", "a100-80g"),
        ("A100-SXM4-40GB", "a100-40g"),
        ("H100-SXM", "h100"),
        ("h100_sxm5", "h100"),
        ("NVIDIA-H100-80GB-HBM3", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("RTX-4090", "rtx4090"),
        ("H200", "h200"),
    ],
)
def test_devices_by_the_names_that_people_give_them(name, device):
    assert ClusterShape.parse(f"{name}:2x8").preset == device


def test_devices_by_the_names_that_drivers_give_them():
    drivers = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100-80g"}
    for driver, name in {**drivers, "NVIDIA GeForce RTX 4090": "rtx4090", "AMD Instinct MI300X": "mi300x"}.items():
        assert same_device(driver, name)
        assert preset(name).product == driver
    for other in ("NVIDIA H100 PCIe", "NVIDIA A100 80GB PCIe", "NVIDIA H100 NVL", "h200"):
        assert not same_device(other, "h100")
    assert not same_device("Intel Xeon", "AMD EPYC")
    assert same_device("Intel Xeon", "Intel Xeon")


def test_a_misspelt_device_is_guessed():
    with pytest.raises(ConfigError, match=r"no device is called 'rtx490'; did you mean 'rtx4090'\? choose one of"):
        cluster("rtx490:8")


@pytest.mark.parametrize(
    ("name", "gib", "board_gib"),
    [
        ("a100-40g", 39.50, 40),
        ("a100-80g", 79.25, 80),
        ("h100", 79.11, 81559 / 1024),
        ("h200", 139.80, 143771 / 1024),
        ("b200", 178.35, 180),
        ("mi300x", 191.98, 192),
        ("l40s", 44.42, 48),
        ("rtx4090", 23.64, 24564 / 1024),
    ],
)
def test_a_preset_has_the_memory_that_pytorch_finds(name, gib, board_gib):
    """What a profile measured there would hold: below what the driver or the data sheet says."""
    memory_gib = cluster(f"{name}:1").device.memory_bytes / 2**30
    assert memory_gib == pytest.approx(gib, abs=0.005)
    assert memory_gib < board_gib
    assert "reports of it" in preset(name).memory_bytes.source
