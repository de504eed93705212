"""What devices can do by their data sheets: one preset a product, every constant with its source.

Takes a preset's name; gives a Preset.  Rates are peaks; the fractions beside them say how much of a peak large
operations reach.  Bandwidths are bytes a second that one device sends (unidirectional): the *bus* bandwidth of a
ring that keeps every device busy.  Knows nothing of how devices are joined into clusters.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files
from typing import get_args

from galvatron.core.errors import ConfigError
from galvatron.core.hardware import Device
from galvatron.core.model import Precision
from galvatron.core.records import Record, validate
from galvatron.core.words import did_you_mean, plain, shown


class Constant(Record):
    """A number and where it comes from."""

    value: float
    source: str


class Preset(Record):
    """One product in the server it usually comes in; ``product`` is the name that its driver gives.

    ``memory_bytes``: what PyTorch finds there, as a measured profile has it: less than the data sheet says.
    ``exponentials_per_s``: of the units for special functions.  ``host_bytes_per_s``: see ``core.hardware.Device``.

    ``intra_*``: between the devices of a node; ``intra_peer_bytes_per_s`` is what one device can send to one other,
    less than all it can send where every pair has a link of its own.  ``inter_*``: each device's share of the
    node's network adapters, each adapter a rail of its own.
    """

    name: str
    aliases: tuple[str, ...] = ()
    product: str
    memory_bytes: Constant
    bf16_flops_per_s: Constant
    fp32_flops_per_s: Constant
    memory_bytes_per_s: Constant
    matmul_efficiency: Constant
    memory_efficiency: Constant
    exponentials_per_s: Constant
    host_bytes_per_s: Constant
    devices_per_node: Constant
    intra_kind: str
    intra_bytes_per_s: Constant
    intra_peer_bytes_per_s: Constant
    intra_efficiency: Constant
    intra_latency_s: Constant
    inter_bytes_per_s: Constant
    inter_efficiency: Constant
    inter_latency_s: Constant
    compute_slowdown: Constant
    communication_slowdown: Constant

    def peak_flops_per_s(self, precision: Precision) -> float:
        """The data sheet's matrix rate; fp32 means TF32, and tensor cores take fp16 as fast as bf16."""
        return self.fp32_flops_per_s.value if precision == "fp32" else self.bf16_flops_per_s.value

    def matmul_flops_per_s(self, precision: Precision) -> float:
        """What large matrix products reach."""
        return self.peak_flops_per_s(precision) * self.matmul_efficiency.value

    @property
    def achieved_memory_bytes_per_s(self) -> float:
        """What large elementwise kernels reach, reads and writes together."""
        return self.memory_bytes_per_s.value * self.memory_efficiency.value

    def device(self) -> Device:
        """The record that a profile holds; ROCm devices too are of type ``cuda``, as PyTorch calls them."""
        return Device(
            name=self.product,
            type="cuda",
            memory_bytes=int(self.memory_bytes.value),
            matmul_flops_per_s={precision: self.matmul_flops_per_s(precision) for precision in get_args(Precision)},
            host_bytes_per_s=self.host_bytes_per_s.value,
        )


class _Presets(Record):
    devices: tuple[Preset, ...]


@cache
def _presets() -> tuple[Preset, ...]:
    text = files(__package__).joinpath("devices.json").read_text(encoding="utf-8")
    return validate(_Presets, json.loads(text), "devices.json", ConfigError).devices


DEVICES: tuple[str, ...] = tuple(preset.name for preset in _presets())
"""The names of all presets."""


@cache
def _names() -> dict[str, Preset]:
    return {_called(name): p for p in _presets() for name in (p.name, *p.aliases, p.product)}


def _called(name: str) -> str:
    """A name without case, dashes, maker and where it was brought in from."""
    return re.sub(r"nvidia|amdinstinct|geforce|imported$", "", plain(name))


def find_preset(name: str) -> Preset | None:
    """The preset of that name, alias or name that the driver gives; None if there is none."""
    return _names().get(_called(name))


def preset(name: str) -> Preset:
    """The preset of that name, alias or product name; case and dashes make no difference.

    Raises:
        ConfigError: there is none.
    """
    found = find_preset(name)
    if found is None:
        raise ConfigError(
            f"no device is called {shown(name)}{did_you_mean(name, DEVICES)}choose one of {', '.join(DEVICES)}"
        )
    return found


def same_device(first: str, second: str) -> bool:
    """Whether two names are of one product: ``NVIDIA H100 80GB HBM3`` and ``h100`` are."""
    known = find_preset(first), find_preset(second)
    return known[0] is known[1] if all(known) else first == second
