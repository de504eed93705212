"""Clusters by name: ``h100:16x8`` is 16 nodes of 8 H100.

Takes such a text and overrides of its links; gives a ClusterShape, and from it a HardwareProfile labelled
``estimated``.  Knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Self

from pydantic import PositiveFloat, PositiveInt

from galvatron.core.errors import ConfigError
from galvatron.core.hardware import HardwareProfile, Overlap
from galvatron.core.numbers import MAX_DEVICES
from galvatron.core.records import Record
from galvatron.core.words import shown
from galvatron.plan.axes import divisors

from .devices import DEVICES, Preset, preset
from .topology import Topology

BYTES_PER_S = {"GB/s": 1e9, "MB/s": 1e6, "TB/s": 1e12, "Gb/s": 1e9 / 8, "Mb/s": 1e6 / 8}
SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "ns": 1e-9, "s": 1.0}
LINKS = {"inter": BYTES_PER_S, "intra": BYTES_PER_S, "inter_latency": SECONDS, "intra_latency": SECONDS}
FIELDS = {"inter": "inter_bytes_per_s", "intra": "intra_bytes_per_s"}


class Overrides(Record):
    """What replaces a preset's link rates; line rates a device sends at, of which its efficiency is then taken."""

    inter_bytes_per_s: PositiveFloat | None = None
    intra_bytes_per_s: PositiveFloat | None = None
    inter_latency_s: PositiveFloat | None = None
    intra_latency_s: PositiveFloat | None = None


class ClusterShape(Record):
    """``nodes`` of ``devices_per_node`` devices of one preset."""

    preset: str
    nodes: PositiveInt
    devices_per_node: PositiveInt
    overrides: Overrides = Overrides()

    @classmethod
    def parse(cls, text: str, links: Sequence[str] = ()) -> Self:
        """``h100:16x8`` and ``("inter=50GB/s", "inter_latency=5us")``.

        ``h100:24`` fills the fewest equal nodes of no more devices than the preset's server has: 3 x 8; 12 are 2 x 6.

        Raises:
            ConfigError: the text, the device or an override is none of these.
        """
        match = re.fullmatch(r"([\w. -]+):(?:([1-9]\d{0,6})x)?([1-9]\d{0,6})", text.strip(), re.ASCII)
        if match is None:
            raise ConfigError(
                f"a cluster is device:nodesxdevices, got {shown(text)}; write h100:16x8 or h100:8, with one of "
                f"{', '.join(DEVICES)}"
            )
        found, number = preset(match[1]), int(match[3])
        if number * int(match[2] or 1) > MAX_DEVICES:
            raise ConfigError(f"a cluster has at most {MAX_DEVICES:,} devices, got {text!r}; take fewer")
        if match[2] is not None:
            nodes, per_node = int(match[2]), number
        else:
            per_node = max(n for n in divisors(number) if n <= found.devices_per_node.value)
            nodes = number // per_node
        return cls(preset=found.name, nodes=nodes, devices_per_node=per_node, overrides=_overrides(links))

    @property
    def world_size(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.devices_per_node

    def with_nodes(self, nodes: int) -> Self:
        """The same with another number of nodes."""
        return type(self)(
            preset=self.preset, nodes=nodes, devices_per_node=self.devices_per_node, overrides=self.overrides
        )

    def with_faster_network(self, factor: float) -> Self:
        """The same with ``factor`` times the line rate between nodes."""
        rate = self.overrides.inter_bytes_per_s or preset(self.preset).inter_bytes_per_s.value
        overrides = self.overrides.model_copy(update={"inter_bytes_per_s": factor * rate})
        return type(self)(
            preset=self.preset, nodes=self.nodes, devices_per_node=self.devices_per_node, overrides=overrides
        )

    def __str__(self) -> str:
        return f"{self.preset}:{self.nodes}x{self.devices_per_node}"

    def topology(self) -> Topology:
        """The achieved rates: line rates of the preset or its overrides, times the preset's efficiencies."""
        device, over = preset(self.preset), self.overrides
        intra = over.intra_bytes_per_s or device.intra_bytes_per_s.value
        peer_share = device.intra_peer_bytes_per_s.value / device.intra_bytes_per_s.value
        inter = over.inter_bytes_per_s or device.inter_bytes_per_s.value
        return Topology(
            nodes=self.nodes,
            devices_per_node=self.devices_per_node,
            intra_bytes_per_s=intra * device.intra_efficiency.value,
            intra_peer_bytes_per_s=intra * peer_share * device.intra_efficiency.value,
            intra_latency_s=over.intra_latency_s or device.intra_latency_s.value,
            inter_bytes_per_s=inter * device.inter_efficiency.value,
            inter_latency_s=over.inter_latency_s or device.inter_latency_s.value,
        )

    def profile(self) -> HardwareProfile:
        """The hardware profile, with every link that a plan for this world can ask for."""
        device = preset(self.preset)
        return HardwareProfile(
            device=device.device(),
            world_size=self.world_size,
            devices_per_node=self.devices_per_node,
            backend="nccl",
            origin="estimated",
            links=self.topology().links(),
            overlap=_overlap(device),
        )


def cluster(text: str, links: Sequence[str] = ()) -> HardwareProfile:
    """The estimated profile of ``h100:16x8``; ``links`` such as ``inter=50GB/s`` override the preset's.

    Raises:
        ConfigError: the text, the device or an override cannot be read.
    """
    return ClusterShape.parse(text, links).profile()


def _overlap(device: Preset) -> Overlap:
    return Overlap(
        compute_slowdown=device.compute_slowdown.value, communication_slowdown=device.communication_slowdown.value
    )


def _overrides(links: Sequence[str]) -> Overrides:
    found = dict(_override(text) for text in links)
    if len(found) < len(links):
        raise ConfigError(f"every link may be given once, got {', '.join(links)}; leave out all but one of each")
    return Overrides.model_validate(found)


def _override(text: str) -> tuple[str, float]:
    """``inter=50GB/s`` as (field, value in base units)."""
    name, _, value = text.partition("=")
    units = LINKS.get(name.strip())
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-zµ/]+)\s*", value, re.ASCII)
    base = float(match[1]) * units[match[2]] if units and match and match[2] in units else 0.0
    least, most = (1e-9, 1e3) if units is SECONDS else (1e3, 1e15)
    if not least <= base <= most:
        raise ConfigError(
            f"a link is one of {', '.join(LINKS)} with a rate from 1 kB/s to 1 PB/s or a time from 1 ns to 1,000 s, "
            f"got {shown(text)}; write inter=50GB/s, intra=400Gb/s or inter_latency=5us"
        )
    return FIELDS.get(name.strip(), f"{name.strip()}_s"), base
