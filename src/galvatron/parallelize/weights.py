"""Where initial weights come from: a safetensors checkpoint, tensors in memory, or the seed (models.initialize).

A source reads boxes of named parameters, so every rank reads just the bytes it will hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from galvatron.core.errors import CheckpointError
from galvatron.core.records import read_text

from .pieces import LocalParameter, box


class Weights(Protocol):
    """A source of parameter values."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole parameter ``name``; raises CheckpointError if there is none."""
        ...

    def read(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """The box of parameter ``name`` at ``offset`` of ``size``, any dtype and device."""
        ...


def fill(parameters: list[LocalParameter], weights: Weights) -> None:
    """Copy every piece of ``parameters`` from ``weights``; raises CheckpointError if one is missing or misshapen."""
    with torch.no_grad():
        for parameter in parameters:
            # a larger tensor would load too: its first rows, in silence
            given, wanted = weights.shape(parameter.name), parameter.global_shape
            if given != wanted:
                raise CheckpointError(
                    f"{parameter.name} has shape {list(given)} in the weights but {list(wanted)} in the model; "
                    "give weights of the same model"
                )
            for piece in parameter.pieces:
                value = weights.read(parameter.name, piece.global_offset, piece.size)
                box(parameter.tensor, piece.local_offset, piece.size).copy_(value)


class StateDictWeights:
    """Weights already in memory, by Hugging Face name."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """See Weights."""
        if name not in self._tensors:
            raise CheckpointError(f"the weights lack {name}; give a state dict of the same model")
        return tuple(self._tensors[name].shape)

    def read(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """See Weights."""
        return box(self._tensors[name].detach(), offset, size)


class SafetensorsWeights:
    """A Hugging Face directory of ``model.safetensors`` or its shards, read by slices."""

    def __init__(self, directory: str | Path, base_prefix: str = "") -> None:
        """Open ``directory``; ``base_prefix`` (``"transformer"``) is what hub files may lack before a name."""
        self._directory = Path(directory)
        self._prefix = f"{base_prefix}." if base_prefix else ""
        self._files: dict[str, Any] = {}
        self._file_of = self._index()

    def shape(self, name: str) -> tuple[int, ...]:
        """See Weights."""
        return tuple(self._view(name).get_shape())

    def read(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """See Weights."""
        value: torch.Tensor = self._view(name)[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
        return value

    def _view(self, name: str) -> Any:
        """The tensor ``name`` on disk, of which slices can be read."""
        key = name if name in self._file_of else name.removeprefix(self._prefix)
        if key not in self._file_of:
            raise CheckpointError(f"{self._directory} lacks {name}; give a checkpoint of the same model")
        return self._open(self._file_of[key]).get_slice(key)

    def _index(self) -> dict[str, str]:
        index = self._directory / "model.safetensors.index.json"
        if index.is_file():
            try:
                return dict(json.loads(read_text(index, CheckpointError))["weight_map"])
            except (json.JSONDecodeError, KeyError, TypeError):
                raise CheckpointError(f"{index} is not a safetensors index; download it again") from None
        single = "model.safetensors"
        if not (self._directory / single).is_file():
            raise CheckpointError(f"{self._directory} has no model.safetensors or its index; give a safetensors model")
        return dict.fromkeys(self._open(single).keys(), single)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self._directory / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self._directory / file} cannot be read ({error}); download it again") from None
        return self._files[file]
