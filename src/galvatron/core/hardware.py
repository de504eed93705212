"""What a cluster does (HardwareProfile, ``hardware.json``): devices, links, overlap.

Link times are fitted as α + β·bytes.  ``bytes`` is the size of the whole tensor a collective is about, so
1 / β is an *algorithm* bandwidth: all_reduce: the tensor; all_gather: its output; reduce_scatter: its
input; all_to_all: one rank's input; p2p: the message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from .errors import GalvatronError, ProfileError
from .model import Origin, Precision
from .numbers import Bytes, Devices, Finite, Rate, Ratio, Seconds
from .records import FileRecord, Record

Op = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p"]
OPS: tuple[Op, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p")


class Device(Record):
    """One device; ``matmul_flops_per_s`` is the best measured matrix-multiply rate by precision.

    ``full_speed_fraction`` is which part of the ranks can compute at full speed at once: 1 where each has a device
    of its own, 0.5 where four processes share two cores.  All rates and times are measured with all ranks busy.
    ``communicator_bytes``: what a group of ranks beside the world takes of a CUDA device once it has communicated.
    ``host_bytes_per_s``: at which host memory sends bytes to every device and takes as many back, beside each other
    where copies have an engine of their own; None where nobody measured it.
    """

    name: str
    type: Literal["cpu", "cuda"]
    memory_bytes: Bytes
    matmul_flops_per_s: dict[Precision, Rate]
    full_speed_fraction: float = Field(default=1.0, strict=True, gt=0, le=1)
    communicator_bytes: Bytes | None = None
    host_bytes_per_s: Rate | None = None


class Link(Record):
    """One operation over groups of ``size`` ranks ``stride`` apart: time = latency_s + bytes × seconds_per_byte.

    All groups of one shape run at once while measured, as they do in training.  ``residual`` is the median
    relative error of the fit over ``samples`` of (bytes, seconds).
    """

    op: Op
    size: Devices
    stride: Devices
    latency_s: Seconds
    seconds_per_byte: Seconds
    residual: Finite = 0.0
    samples: tuple[tuple[Bytes, Seconds], ...] = ()

    def time_s(self, num_bytes: float) -> float:
        """Seconds for one operation on ``num_bytes`` (see the module for what they count)."""
        return self.latency_s + num_bytes * self.seconds_per_byte


class Overlap(Record):
    """How many times longer compute and communication take while they run together (≥ 1)."""

    compute_slowdown: Ratio
    communication_slowdown: Ratio


@dataclass(frozen=True)
class LinkTable:
    """The links of one operation as matrices over sizes and strides; NaN where a shape was not measured."""

    sizes: NDArray[np.int64]
    strides: NDArray[np.int64]
    latency_s: NDArray[np.float64]
    seconds_per_byte: NDArray[np.float64]

    @classmethod
    def of(cls, links: Iterable[Link]) -> Self:
        """The table of ``links``; groups of one rank, of any stride, take no time."""
        listed = list(links)
        sizes = np.unique(np.array([1, *(link.size for link in listed)], dtype=np.int64))
        strides = np.unique(np.array([1, *(link.stride for link in listed)], dtype=np.int64))
        latency_s = np.full((len(sizes), len(strides)), np.nan)
        latency_s[0] = 0.0
        seconds_per_byte = latency_s.copy()
        for link in listed:
            at = np.searchsorted(sizes, link.size), np.searchsorted(strides, link.stride)
            latency_s[at], seconds_per_byte[at] = link.latency_s, link.seconds_per_byte
        return cls(sizes, strides, latency_s, seconds_per_byte)

    def find(
        self, size: NDArray[np.int64], stride: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(latency_s, seconds_per_byte) of every (size, stride), broadcast; NaN where there is none."""
        row = np.minimum(np.searchsorted(self.sizes, size), len(self.sizes) - 1)
        column = np.minimum(np.searchsorted(self.strides, stride), len(self.strides) - 1)
        known = (size == 1) | ((self.sizes[row] == size) & (self.strides[column] == stride))
        latency_s = np.where(known, self.latency_s[row, column], np.nan)
        return latency_s, np.where(known, self.seconds_per_byte[row, column], np.nan)


class HardwareProfile(FileRecord):
    """``hardware.json``: one world of equal devices; measured unless ``origin`` says otherwise."""

    FORMAT: ClassVar[str] = "galvatron.hardware"
    ERROR: ClassVar[type[GalvatronError]] = ProfileError

    device: Device
    world_size: Devices
    devices_per_node: Devices
    backend: Literal["gloo", "nccl"]
    origin: Origin = "measured"
    links: tuple[Link, ...]
    overlap: Overlap

    @model_validator(mode="after")
    def _links_are_given_once(self) -> Self:
        keys = [(link.op, link.size, link.stride) for link in self.links]
        if len(set(keys)) < len(keys):
            twice, _ = Counter(keys).most_common(1)[0]
            raise ValueError(f"two links of {' '.join(map(str, twice))}; leave out all but one")
        return self

    @cached_property
    def _links(self) -> dict[tuple[Op, int, int], Link]:
        return {(link.op, link.size, link.stride): link for link in self.links}

    @cached_property
    def _tables(self) -> dict[Op, LinkTable]:
        return {op: LinkTable.of(link for link in self.links if link.op == op) for op in OPS}

    def link_table(self, op: Op) -> LinkTable:
        """All links of one operation, to look many shapes up at once."""
        return self._tables[op]

    def has_link(self, op: Op, size: int, stride: int) -> bool:
        """Whether that shape was measured."""
        return (op, size, stride) in self._links

    def link(self, op: Op, size: int, stride: int) -> Link:
        """The link measured for ``op`` over groups of that shape.

        Raises:
            ProfileError: the profile has no measurement of that shape.
        """
        found = self._links.get((op, size, stride))
        if found is None:
            measured = sorted({(link.size, link.stride) for link in self.links if link.op == op})
            raise ProfileError(
                f"the hardware profile has no {op} over groups of size={size}, stride={stride}; "
                f"measured (size, stride): {measured}; profile the hardware with world size {self.world_size}"
            )
        return found
