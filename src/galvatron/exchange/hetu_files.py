"""Hetu-Galvatron's JSON files: names, keys and units.

Takes paths; gives numbers as the files have them (milliseconds, MiB, GB/s), validated.  What its files call MB is
2^20 bytes: what a recomputed T5-3B layer keeps, 512 x 1024 elements in bf16, reads 1.0 there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, NonNegativeFloat, PositiveFloat

from galvatron.core.errors import GalvatronError, ProfileError
from galvatron.core.records import Record, read_text, validate

MIB = 2**20

_TIME = re.compile(r"layertype_(\d+|other)_bsz(\d+)_seq\[?([\d,]+)\]?")
_LAYER = re.compile(r"layertype_(\d+)(_sp)?")
_OTHER = re.compile(r"other_memory_pp_(off|on_first|on_last)(_sp)?")

Tokens = tuple[int, ...]
"""Tokens of a sequence, a number for every type of layer; one number where all are equal."""


class LayerMemory(Record):
    """One type of layer: float32 parameters in MiB, MiB saved a sample by tp degree and under ``checkpoint``."""

    parameter_size: PositiveFloat
    tp_activation_per_bsz_dict: dict[str, NonNegativeFloat]

    @property
    def by_tp(self) -> dict[int, float]:
        """MiB that one sample leaves behind on a rank, by tp degree."""
        return {int(key): value for key, value in self.tp_activation_per_bsz_dict.items() if key.isdigit()}

    @property
    def recomputed_mib(self) -> float | None:
        """MiB that one sample leaves behind at tp 1 when the layer is recomputed; None where it was not measured."""
        return self.tp_activation_per_bsz_dict.get("checkpoint")


class OtherMemory(Record):
    """Embedding and head: MiB by the tp degree of the vocabulary; model states are not used here."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    activation: dict[int, NonNegativeFloat]


class Memory(Record):
    """A memory file: layers by (type, tokens), embedding and head by (place, tokens).

    ``sequence_parallel``: whether tensor parallelism cut the sequence between its regions while it was measured.
    """

    layers: dict[tuple[int, Tokens], LayerMemory]
    others: dict[tuple[str, Tokens], OtherMemory]
    sequence_parallel: bool


def read_json(path: Path, error: type[GalvatronError] = ProfileError) -> dict[str, Any]:
    """The object in ``path``; one sentence of class ``error`` where there is none."""
    try:
        data = json.loads(read_text(path, error))
    except json.JSONDecodeError as failure:
        raise error(f"{path} is not JSON ({failure}); give a file that Hetu-Galvatron wrote") from None
    if not isinstance(data, dict):
        raise error(f"{path} must hold one JSON object, got a {type(data).__name__}; give a file of Hetu-Galvatron")
    return data


def read_numbers(path: Path) -> dict[str, float]:
    """A flat file of numbers, none negative."""
    data = read_json(path)
    for key, value in data.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise ProfileError(f"{path}: {key} must be a number of 0 or more, got {value!r}; measure it again")
    return data


def read_times(path: Path) -> dict[tuple[str, Tokens], dict[int, float]]:
    """``{(type or "other", tokens): {batch: milliseconds a sample}}`` of a computation file.

    Raw times of whole models (``layernum[...]``), which these come from, are left alone.
    """
    times: dict[tuple[str, Tokens], dict[int, float]] = {}
    for key, value in read_numbers(path).items():
        match = _TIME.fullmatch(key)
        if match is not None:
            times.setdefault((match[1], parse_tokens(match[3])), {})[int(match[2])] = value
    if not any(kind.isdigit() for kind, _ in times):
        raise ProfileError(f"{path} must have keys such as layertype_0_bsz8_seq2048; give a computation file")
    return times


def read_memory(path: Path) -> Memory:
    """A memory file; where it has values with and without sequence parallelism, those with it."""
    data = read_json(path)
    suffix = "_sp" if any((match := _LAYER.fullmatch(key)) and match[2] for key in data) else ""
    layers = {
        (int(name), tokens): validate(LayerMemory, value, f"{path}: layertype_{name}{suffix}", ProfileError)
        for name, tokens, value in _entries(data, _LAYER, suffix, path)
    }
    others = {
        (name, tokens): validate(OtherMemory, value, f"{path}: other_memory_pp_{name}{suffix}", ProfileError)
        for name, tokens, value in _entries(data, _OTHER, suffix, path)
    }
    if not layers:
        raise ProfileError(f"{path} must have keys such as layertype_0 or layertype_0_sp; give a memory file")
    return Memory(layers=layers, others=others, sequence_parallel=bool(suffix))


def _entries(
    data: Mapping[str, Any], pattern: re.Pattern[str], suffix: str, path: Path
) -> Iterator[tuple[str, Tokens, Any]]:
    for key, by_tokens in data.items():
        match = pattern.fullmatch(key)
        if match is None or (match[2] or "") != suffix:
            continue
        if not isinstance(by_tokens, dict):
            raise ProfileError(f"{path}: {key} must list values by sequence length; give a memory file")
        for tokens, value in by_tokens.items():
            yield match[1], parse_tokens(tokens.strip("[]")), value


def parse_tokens(text: str) -> Tokens:
    """``"3136,784"`` → (3136, 784)."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ProfileError(f"a sequence length is a number or [n,n,...], got {text!r}; mend that key")
    return tuple(map(int, parts))
