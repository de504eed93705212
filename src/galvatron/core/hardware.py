"""What a cluster does (HardwareProfile, ``hardware.json``): devices, links, overlap.

Link times are fitted as α + β·bytes.  ``bytes`` is the size of the whole tensor a collective is about, so
1 / β is an *algorithm* bandwidth: all_reduce: the tensor; all_gather: its output; reduce_scatter: its
input; all_to_all: one rank's input; p2p: the message.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .errors import GalvatronError, ProfileError
from .model import Precision
from .records import FileRecord, Record

Op = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p"]
OPS: tuple[Op, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p")


class Device(Record):
    """One device; ``matmul_flops_per_s`` is the best measured matrix-multiply rate by precision.

    ``full_speed_fraction`` is which part of the ranks can compute at full speed at once: 1 where each has a device
    of its own, 0.5 where four processes share two cores.  All rates and times are measured with all ranks busy.
    """

    name: str
    type: Literal["cpu", "cuda"]
    memory_bytes: int
    matmul_flops_per_s: dict[Precision, float]
    full_speed_fraction: float = Field(default=1.0, gt=0, le=1)


class Link(Record):
    """One operation over groups of ``size`` ranks ``stride`` apart: time = latency_s + bytes × seconds_per_byte.

    All groups of one shape run at once while measured, as they do in training.  ``residual`` is the median
    relative error of the fit over ``samples`` of (bytes, seconds).
    """

    op: Op
    size: int
    stride: int
    latency_s: float
    seconds_per_byte: float
    residual: float = 0.0
    samples: tuple[tuple[int, float], ...] = ()

    def time_s(self, num_bytes: float) -> float:
        """Seconds for one operation on ``num_bytes`` (see the module for what they count)."""
        return self.latency_s + num_bytes * self.seconds_per_byte


class Overlap(Record):
    """How many times longer compute and communication take while they run together (≥ 1)."""

    compute_slowdown: float
    communication_slowdown: float


class HardwareProfile(FileRecord):
    """``hardware.json``: one world of equal devices."""

    FORMAT: ClassVar[str] = "galvatron.hardware"
    ERROR: ClassVar[type[GalvatronError]] = ProfileError

    device: Device
    world_size: int
    devices_per_node: int
    backend: Literal["gloo", "nccl"]
    links: tuple[Link, ...]
    overlap: Overlap

    def link(self, op: Op, size: int, stride: int) -> Link:
        """The link measured for ``op`` over groups of that shape.

        Raises:
            ProfileError: the profile has no measurement of that shape.
        """
        fits = [link for link in self.links if link.op == op and link.size == size and link.stride == stride]
        if not fits:
            measured = sorted({(link.size, link.stride) for link in self.links if link.op == op})
            raise ProfileError(
                f"the hardware profile has no {op} over groups of size={size}, stride={stride}; "
                f"measured (size, stride): {measured}; profile the hardware with world size {self.world_size}"
            )
        return fits[0]
