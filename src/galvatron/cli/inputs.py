"""What ``galvatron search`` plans for, from the words of its options: a cluster, a model, batches.

Takes names, texts and files; gives profiles: measured ones as they are, estimated ones for names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from galvatron.core.errors import ConfigError, ProfileError
from galvatron.core.hardware import HardwareProfile
from galvatron.core.lora import Lora
from galvatron.core.model import Precision
from galvatron.core.model_profile import ModelProfile
from galvatron.core.numbers import MAX_SEQUENCES, MAX_TOKENS
from galvatron.core.parsing import is_file, parse_json, read_text
from galvatron.core.units import format_bytes, parse_bytes
from galvatron.core.words import shown
from galvatron.plan.axes import StageAxes, divisors

if TYPE_CHECKING:
    from galvatron.core.tasks import Task
    from galvatron.estimate import ClusterShape

ENDLESS_SEQ_LEN = 512
"""What models whose positions have no end were trained with, as T5."""
_SIZE = r"[1-9]\d{0,14}"
USUAL_TP = 64
"""The largest tp that models are estimated for unless a larger one is asked for; no preset joins more devices fast."""


@dataclass(frozen=True)
class Cluster:
    """A hardware profile, and the shape it was estimated for; None where it comes from a file."""

    hardware: HardwareProfile
    shape: ClusterShape | None = None

    @classmethod
    def of(cls, text: str, links: list[str]) -> Cluster:
        """``h100:16x8`` with its ``links`` overridden, or a ``hardware.json``.

        Raises:
            ConfigError: a preset, a link or both cannot be read.
            ProfileError: the file cannot be read.
        """
        if text.endswith(".json") or is_file(text):
            if links:
                raise ConfigError(f"--link {links[0]} is for presets, but {text} is a file; edit the links in it")
            return cls(HardwareProfile.load(text))
        from galvatron.estimate import ClusterShape

        shape = ClusterShape.parse(text, links)
        return cls(shape.profile(), shape)


@dataclass(frozen=True)
class Model:
    """A model by name or file, with what its profile shall be of where it has to be estimated."""

    name: str
    seq_len: int | None
    precision: Precision | None
    tp_asked: int = 1
    lora: Lora | None = None
    task: Task | None = None
    capacity_factor: float | None = None

    def profile(self, hardware: HardwareProfile) -> ModelProfile:
        """A ``model.json`` as it is; a card or configuration estimated for the cluster's device.

        Raises:
            ConfigError: it is none of these, or lacks a length, or experts that have a capacity.
            ProfileError: the ``model.json`` is malformed.
        """
        profile = self._profile(hardware)
        return profile if self.capacity_factor is None else profile.with_capacity(self.capacity_factor)

    def _profile(self, hardware: HardwareProfile) -> ModelProfile:
        path = Path(self.name)
        if is_file(self.name) and _has_format(read_text(path, ProfileError)):
            if self.lora is not None:
                raise ConfigError(
                    f"{self.name} is a profile of its own adapters or none; profile the model with --lora"
                )
            profile = ModelProfile.load(path)
            if self.task not in (None, profile.spec.task):
                raise ConfigError(
                    f"{self.name} is a profile for {profile.spec.task}, not {self.task}; profile the model with --task"
                )
            return profile
        from galvatron.estimate import adapted_spec, estimate_model, model_spec

        spec = model_spec(self.name, self.task)
        if self.lora is not None:
            spec = adapted_spec(spec, self.lora)
        seq_len = spec.max_seq_len if spec.task == "image_classification" and not self.seq_len else self.seq_len
        if seq_len is None:
            most, usual = (f"at most {spec.max_seq_len} for", min(spec.max_seq_len, 4096))
            if spec.max_seq_len == MAX_TOKENS:
                most, usual = "any number for", ENDLESS_SEQ_LEN
            raise ConfigError(
                f"a model that was not profiled needs the tokens of a sequence, {most} {spec.name}; "
                f"give --seq-len {usual}"
            )
        degrees = tp_degrees(hardware.world_size, max(USUAL_TP, self.tp_asked))
        return estimate_model(
            spec, hardware.device, seq_len=seq_len, precision=self.precision or "bf16", tp_degrees=degrees
        )


def _has_format(text: str) -> bool:
    """Whether this is a file of this project; one that is no JSON is left to its reader to refuse."""
    try:
        data = parse_json(text, "", ConfigError, "")
    except ConfigError:
        return False
    return isinstance(data, dict) and "format" in data


def memory_limit(text: str | None, hardware: HardwareProfile) -> int | None:
    """The bytes a device that ``text`` allows; None for all it has.

    Raises:
        ConfigError: it is no size, or more than a device has.
    """
    limit, device = None if text is None else parse_bytes(text), hardware.device
    if limit is not None and limit > device.memory_bytes:
        raise ConfigError(
            f"a limit of {text} is more than the {format_bytes(device.memory_bytes)} that {device.name} has; "
            "lower it, or leave it out to use all"
        )
    return limit


def tp_degrees(world_size: int, at_most: int) -> list[int]:
    """The degrees that some stage of the world has, up to ``at_most``."""
    degrees = {degree for stage in divisors(world_size) for degree in StageAxes(stage).degrees}
    return sorted(degree for degree in degrees if degree <= at_most)


def fraction(text: str) -> float:
    """``1%`` → 0.01.

    Raises:
        ConfigError: it is no percentage, or 100% and more.
    """
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,9})?)\s*%\s*", text, re.ASCII)
    if match is None or float(match[1]) >= 100:
        raise ConfigError(f"a gap is a percentage below 100, got {shown(text)}; write 1% or 0.1%")
    return float(match[1]) / 100


def batch_sizes(text: str) -> list[int]:
    """``64``, ``64,96,128``, or ``64-512``: the first, doubled as long as it is within the range.

    Raises:
        ConfigError: the text is none of these.
    """
    text = text.replace(" ", "")
    if re.fullmatch(rf"{_SIZE}(,{_SIZE})*", text, re.ASCII):
        return sorted({int(size) for size in text.split(",")})
    match = re.fullmatch(rf"({_SIZE})-({_SIZE})", text, re.ASCII)
    if match is None or int(match[1]) > int(match[2]):
        raise ConfigError(
            f"a global batch is a number of sequences, a range or a list, of {MAX_SEQUENCES:,} at most, "
            f"got {shown(text)}; write 64, 64-512 or 64,96,128"
        )
    first, last = int(match[1]), int(match[2])
    return [first * 2**i for i in range((last // first).bit_length())]
