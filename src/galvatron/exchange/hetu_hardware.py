"""Hetu-Galvatron's bandwidth, latency and overlap files as a HardwareProfile.

Takes a folder of ``allreduce_bandwidth_*``, ``p2p_bandwidth_*``, ``sp_time_*`` and ``overlap_coefficient.json``;
gives ``hardware.json`` with origin ``imported``, and sentences on what was not measured and taken from elsewhere.

Bus bandwidths are in 10^9 bytes/s as NCCL's tests print them, per rank: an all-reduce of B bytes over n ranks takes
2 (n-1)/n x B / bandwidth, an all-gather or reduce-scatter half of that (NCCL tests, doc/PERFORMANCE.md).
``sp_time`` files time collectives of 1 to 1024 MiB: they give latencies, and the all-to-alls inside a node.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from galvatron.core.errors import ProfileError
from galvatron.core.fit import Sample, fit_line, residual
from galvatron.core.hardware import Device, HardwareProfile, Link, Overlap
from galvatron.plan.groups import group_shapes, p2p_strides

from .hetu_files import MIB, read_numbers

A100_HALF_FLOPS_PER_S = 312e12  # NVIDIA A100 datasheet: dense bf16 and fp16 tensor cores
A100_MEMORY_BYTES = 40 * 10**9  # the smaller of the two A100s (40 and 80 GB)
GIGA = 1e9

Samples = tuple[Sample, ...]
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _Cluster:
    """The files of one cluster: bytes/s by (group size, neighbouring ranks or not), within a node and over all."""

    nodes: int
    gpus_per_node: int
    everywhere: Mapping[tuple[int, bool], float]
    in_node: Mapping[tuple[int, bool], float]
    between_stages: Mapping[int, float]
    times: Mapping[tuple[str, int], Samples]

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


def import_hardware(
    folder: Path,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    device_memory_bytes: int = A100_MEMORY_BYTES,
) -> tuple[HardwareProfile, tuple[str, ...]]:
    """The profile of ``nodes`` x ``gpus_per_node`` A100s (1 x 8 if left out), and a sentence on each thing assumed.

    Raises:
        ProfileError: a file is missing or malformed.
    """
    cluster = _read(folder, *_chosen(folder, nodes, gpus_per_node))
    slowdown = _overlap(folder)
    notes: dict[str, None] = {}  # in order, each once
    links = [link for size, stride in group_shapes(cluster.world_size) for link in _links(cluster, size, stride, notes)]
    links += [_p2p(cluster, stride, notes) for stride in p2p_strides(cluster.world_size)]
    if not cluster.times:
        notes["no sp_time file was found: latencies are taken as 0"] = None
    profile = HardwareProfile(
        device=Device(
            name="A100 (imported)",
            type="cuda",
            memory_bytes=device_memory_bytes,
            matmul_flops_per_s={"bf16": A100_HALF_FLOPS_PER_S, "fp16": A100_HALF_FLOPS_PER_S},
        ),
        world_size=cluster.world_size,
        devices_per_node=cluster.gpus_per_node,
        backend="nccl",
        origin="imported",
        links=tuple(links),
        overlap=Overlap(compute_slowdown=slowdown, communication_slowdown=slowdown),
    )
    return profile, tuple(notes)


def _file(folder: Path, what: str, nodes: int, gpus: int) -> Path:
    return folder / f"{what}_{nodes}nodes_{gpus}gpus_per_node.json"


def _chosen(folder: Path, nodes: int | None, gpus: int | None) -> tuple[int, int]:
    """The world asked for, which must have been measured; what is left out is 1 node or 8 devices where that exists."""
    pattern = re.compile(r"allreduce_bandwidth_(\d+)nodes_(\d+)gpus_per_node")
    names = folder.glob("allreduce_bandwidth_*.json")
    found = sorted((int(m[1]), int(m[2])) for m in (pattern.fullmatch(path.stem) for path in names) if m)
    fits = [(n, g) for n, g in found if nodes in (None, n) and gpus in (None, g)]
    if len(fits) > 1:
        usual = (nodes or 1, gpus or 8)
        fits = [usual] if usual in fits else []
    if len(fits) != 1:
        listed = ", ".join(f"{n} x {g}" for n, g in found) or "none"
        raise ProfileError(
            f"{folder} must have one allreduce_bandwidth file of {nodes or 'any'} nodes x {gpus or 'any'} devices; "
            f"found nodes x devices: {listed}; choose one by --nodes and --gpus-per-node"
        )
    return fits[0]


def _read(folder: Path, nodes: int, gpus: int) -> _Cluster:
    everywhere = _file(folder, "allreduce_bandwidth", nodes, gpus)
    one_node = _file(folder, "allreduce_bandwidth", 1, gpus)
    times = next(
        (path for n in (nodes, 1) if (path := _file(folder, "sp_time", n, gpus)).exists()),
        None,
    )
    return _Cluster(
        nodes=nodes,
        gpus_per_node=gpus,
        everywhere=_bandwidths(everywhere),
        in_node=_bandwidths(one_node) if one_node.exists() else {},
        between_stages=_stage_bandwidths(_file(folder, "p2p_bandwidth", nodes, gpus), nodes * gpus),
        times={} if times is None else _times(times),
    )


def _matches(path: Path, pattern: str) -> Iterator[tuple[re.Match[str], float]]:
    compiled, found = re.compile(pattern), False
    for key, value in read_numbers(path).items():
        match = compiled.fullmatch(key)
        if match is not None and value > 0:
            found = True
            yield match, value
    if not found:
        raise ProfileError(f"{path} must have positive numbers under keys such as {pattern}; measure it again")


def _bandwidths(path: Path) -> dict[tuple[int, bool], float]:
    pattern = r"allreduce_size_(\d+)_consec_([01])"
    return {(int(match[1]), match[2] == "1"): GIGA * value for match, value in _matches(path, pattern)}


def _stage_bandwidths(path: Path, world_size: int) -> dict[int, float]:
    """Bytes/s between neighbouring stages, by how many ranks lie between them."""
    return {world_size // int(match[1]): GIGA * value for match, value in _matches(path, r"pp_size_(\d+)")}


def _times(path: Path) -> dict[tuple[str, int], Samples]:
    samples: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for match, value in _matches(path, r"(allreduce|all2all)_size_(\d+)_(\d+)MB_time"):
        samples.setdefault((match[1], int(match[2])), []).append((int(match[3]) * MIB, 1e-3 * value))
    return {key: tuple(sorted(values)) for key, values in samples.items()}


def _overlap(folder: Path) -> float:
    path = folder / "overlap_coefficient.json"
    slowdown = read_numbers(path).get("overlap_coe", 0.0)
    if slowdown < 1:
        raise ProfileError(f"{path}: overlap_coe must be a number of 1 or more, got {slowdown}; measure it again")
    return slowdown


def _links(cluster: _Cluster, size: int, stride: int, notes: dict[str, None]) -> Iterator[Link]:
    bytes_per_s = _bandwidth(cluster, size, stride, notes)
    share = (size - 1) / size
    latency_s = _latency_s(cluster, size, notes)
    for op in ("all_gather", "reduce_scatter"):  # a ring's all-reduce is one of each
        yield Link(op=op, size=size, stride=stride, latency_s=latency_s / 2, seconds_per_byte=share / bytes_per_s)
    yield Link(op="all_reduce", size=size, stride=stride, latency_s=latency_s, seconds_per_byte=2 * share / bytes_per_s)
    yield _all_to_all(cluster, size, stride, share / bytes_per_s, notes)


def _bandwidth(cluster: _Cluster, size: int, stride: int, notes: dict[str, None]) -> float:
    """Bus bytes/s of that shape, or of the nearest size measured."""
    nearest, bytes_per_s = _nearest(_bandwidths_by_size(cluster, size, stride, notes), size)
    if nearest != size:
        notes[f"all-reduce over {size} ranks {stride} apart: taken from {nearest} ranks"] = None
    return bytes_per_s


def _bandwidths_by_size(cluster: _Cluster, size: int, stride: int, notes: dict[str, None]) -> Mapping[int, float]:
    """What was measured with groups of that stride: inside a node by the node's own file, else by the world's."""
    inside = size * stride <= cluster.gpus_per_node
    table = cluster.in_node if inside and cluster.in_node else cluster.everywhere
    near = {measured: value for (measured, neighbours), value in table.items() if neighbours}
    strided = {measured: value for (measured, neighbours), value in table.items() if not neighbours}
    if inside and stride > 1 and (not cluster.in_node or not strided):
        notes[f"groups {stride} apart inside a node: taken from neighbouring ranks"] = None
        strided = near
    chosen = near if stride == 1 else strided
    if not chosen:
        raise ProfileError(
            f"the allreduce_bandwidth file of {cluster.nodes} nodes x {cluster.gpus_per_node} devices must have "
            f"consec_{int(stride == 1)} values for groups of {size} ranks {stride} apart; measure them"
        )
    return chosen


def _nearest(by_size: Mapping[int, Value], size: int) -> tuple[int, Value]:
    """The entry of the size that is nearest as a ratio; of two equally near the smaller."""
    nearest = min(sorted(by_size), key=lambda measured: abs(math.log(measured / size)))
    return nearest, by_size[nearest]


def _latency_s(cluster: _Cluster, size: int, notes: dict[str, None]) -> float:
    """Seconds of an empty all-reduce, from the line through its times."""
    by_size = {measured: samples for (op, measured), samples in cluster.times.items() if op == "allreduce"}
    if not by_size:
        return 0.0
    nearest, samples = _nearest(by_size, size)
    if nearest != size:
        notes[f"latency of {size} ranks: taken from {nearest} ranks"] = None
    return fit_line(samples)[0]


def _all_to_all(cluster: _Cluster, size: int, stride: int, seconds_per_byte: float, notes: dict[str, None]) -> Link:
    """Inside a node from its times; else with their latency at ``seconds_per_byte``, as fast as an all-gather."""
    by_size = {measured: samples for (op, measured), samples in cluster.times.items() if op == "all2all"}
    inside = size * stride <= cluster.gpus_per_node
    if not inside or not by_size:
        where = "inside a node" if inside else "over nodes"
        notes[f"all-to-all {where}: not measured, taken as fast a byte as an all-gather"] = None
        latency_s = fit_line(_nearest(by_size, size)[1])[0] if by_size else 0.0
        return Link(op="all_to_all", size=size, stride=stride, latency_s=latency_s, seconds_per_byte=seconds_per_byte)
    nearest, samples = _nearest(by_size, size)
    if nearest != size:
        notes[f"all-to-all over {size} ranks: taken from {nearest} ranks"] = None
    line = fit_line(samples)
    return Link(
        op="all_to_all",
        size=size,
        stride=stride,
        latency_s=line[0],
        seconds_per_byte=line[1],
        residual=residual(line, samples),
        samples=samples,
    )


def _p2p(cluster: _Cluster, stride: int, notes: dict[str, None]) -> Link:
    """One message to the next stage; its latency is taken as that of a gather of two ranks, which is one exchange."""
    nearest, bytes_per_s = _nearest(cluster.between_stages, stride)
    if nearest != stride:
        notes[f"messages {stride} ranks apart: taken from {nearest} ranks apart"] = None
    latency_s = _latency_s(cluster, 2, notes) / 2
    return Link(op="p2p", size=2, stride=stride, latency_s=latency_s, seconds_per_byte=1 / bytes_per_s)
