"""Another system's bandwidths become links of every shape that a world needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from galvatron.core.errors import ProfileError
from galvatron.core.hardware import HardwareProfile, Link
from galvatron.exchange import import_hardware
from unit.exchange.hetu_fixtures import MIB, hardware_files, reference_folder, write
from unit.profiles import make_hardware


def shapes(profile: HardwareProfile) -> list[tuple[str, int, int]]:
    return sorted((link.op, link.size, link.stride) for link in profile.links)


@pytest.mark.parametrize("nodes", [1, 2])
def test_every_shape_of_the_world_has_its_links(tmp_path: Path, nodes: int) -> None:
    profile, _ = import_hardware(hardware_files(tmp_path, nodes), nodes, 4)
    assert shapes(profile) == shapes(make_hardware(4 * nodes))
    assert (profile.world_size, profile.devices_per_node, profile.origin) == (4 * nodes, 4, "imported")
    assert (profile.overlap.compute_slowdown, profile.overlap.communication_slowdown) == (1.2, 1.2)


def test_bus_bandwidth_becomes_algorithm_bandwidth(tmp_path: Path) -> None:
    profile, notes = import_hardware(hardware_files(tmp_path))
    reduced, gathered = profile.link("all_reduce", 4, 1), profile.link("all_gather", 4, 1)
    assert reduced.seconds_per_byte == pytest.approx(2 * 3 / 4 / 100e9)
    assert gathered.seconds_per_byte == profile.link("reduce_scatter", 4, 1).seconds_per_byte
    assert (2 * gathered.seconds_per_byte, 2 * gathered.latency_s) == (reduced.seconds_per_byte, reduced.latency_s)
    assert reduced.latency_s == pytest.approx(4e-5)
    assert profile.link("all_reduce", 2, 2).seconds_per_byte == pytest.approx(1 / 80e9)
    assert notes == ()


def test_all_to_all_keeps_its_samples_and_how_well_the_line_fits(tmp_path: Path) -> None:
    link = import_hardware(hardware_files(tmp_path))[0].link("all_to_all", 2, 1)
    assert (link.latency_s, link.seconds_per_byte) == pytest.approx((2e-5, 1e-11))
    assert link.residual == pytest.approx(0, abs=1e-9)
    assert [size for size, _ in link.samples] == [MIB, 2 * MIB, 4 * MIB]


def test_groups_over_nodes_are_slow_and_groups_inside_are_not(tmp_path: Path) -> None:
    profile, notes = import_hardware(hardware_files(tmp_path, 2), 2, 4)

    def bandwidth(size: int, stride: int) -> float:
        return 2 * (size - 1) / size / profile.link("all_reduce", size, stride).seconds_per_byte

    wanted = {(4, 1): 100e9, (8, 1): 20e9, (2, 2): 80e9, (2, 4): 5e9, (4, 2): 10e9}
    assert {shape: bandwidth(*shape) for shape in wanted} == pytest.approx(wanted)
    assert any("all-to-all over nodes: not measured" in note for note in notes)
    assert "messages 1 ranks apart: taken from 2 ranks apart" in notes


def test_messages_between_stages_have_their_stride(tmp_path: Path) -> None:
    profile, _ = import_hardware(hardware_files(tmp_path))
    speeds = {stride: 1 / profile.link("p2p", 2, stride).seconds_per_byte for stride in (1, 2)}
    assert speeds == pytest.approx({1: 40e9, 2: 50e9})


def test_without_times_latencies_are_zero_and_said_to_be(tmp_path: Path) -> None:
    (hardware_files(tmp_path) / "sp_time_1nodes_4gpus_per_node.json").unlink()
    profile, notes = import_hardware(tmp_path)
    assert all(link.latency_s == 0 for link in profile.links)
    assert "no sp_time file was found: latencies are taken as 0" in notes


def test_a_missing_size_is_taken_from_the_nearest_and_said_so(tmp_path: Path) -> None:
    write(
        hardware_files(tmp_path) / "allreduce_bandwidth_1nodes_4gpus_per_node.json", {"allreduce_size_2_consec_1": 90.0}
    )
    profile, notes = import_hardware(tmp_path)
    assert profile.link("all_reduce", 4, 1).seconds_per_byte == pytest.approx(2 * 3 / 4 / 90e9)
    assert "all-reduce over 4 ranks 1 apart: taken from 2 ranks" in notes
    assert "groups 2 apart inside a node: taken from neighbouring ranks" in notes


def test_the_world_must_have_been_measured(tmp_path: Path) -> None:
    hardware_files(tmp_path, 2)
    with pytest.raises(ProfileError, match=r"of 3 nodes x any devices; found nodes x devices: 1 x 4, 2 x 4; choose"):
        import_hardware(tmp_path, nodes=3)
    with pytest.raises(ProfileError, match="of any nodes x any devices; found nodes x devices: none"):
        import_hardware(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("overlap_coefficient", {"overlap_coe": 0.5}, "overlap_coe must be a number of 1 or more, got 0.5"),
        (
            "p2p_bandwidth_1nodes_4gpus_per_node",
            {"pp_size_2": 0},
            "must have positive numbers under keys such as pp_size",
        ),
        (
            "p2p_bandwidth_1nodes_4gpus_per_node",
            {"pp_size_2": None},
            "pp_size_2 must be a number of 0 or more, got None",
        ),
    ],
)
def test_a_malformed_file_is_one_sentence(tmp_path: Path, name: str, data: object, message: str) -> None:
    write(hardware_files(tmp_path) / f"{name}.json", data)
    with pytest.raises(ProfileError, match=message):
        import_hardware(tmp_path)


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 4), (1, 8), (2, 8)])
def test_the_real_files_make_whole_worlds(nodes: int, gpus: int) -> None:
    profile, _ = import_hardware(reference_folder() / "hardware", nodes, gpus)
    assert shapes(profile) == shapes(make_hardware(nodes * gpus))
    assert all(isinstance(link, Link) and link.seconds_per_byte > 0 for link in profile.links)
