"""Where initial weights come from: a safetensors checkpoint, tensors in memory, or the seed (models.initialize).

A source reads boxes of named parameters, so every rank reads just the bytes it will hold.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from galvatron.core.errors import CheckpointError
from galvatron.core.lora import is_adapters, plain_name
from galvatron.core.parsing import parse_json
from galvatron.core.records import read_text
from galvatron.internals import needless_names
from galvatron.models import buffers_after_head, lasting_buffers

from ..processes.ranks import rank
from .pieces import LocalParameter, box, is_finite

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose values are plain numbers; 8-bit ones mean something only with their scales."""
AFTER_HEAD = "not zero: it is added to logits, which losses are made without; zero it, or train another model"

_SHOWN = 3  # names that a sentence gives of many


class Weights(Protocol):
    """A source of parameter values."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole parameter ``name``; raises CheckpointError if there is none."""
        ...

    def read(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """The box of parameter ``name`` at ``offset`` of ``size``, any dtype and device."""
        ...


class GivenWeights(Weights, Protocol):
    """A source that may be of another model than the one it is given for."""

    @property
    def origin(self) -> str:
        """Where they come from, for people."""
        ...

    @property
    def keys(self) -> Collection[str]:
        """The names of all its tensors, as it has them."""
        ...

    def find(self, name: str) -> str | None:
        """The key under which it has parameter ``name``; None if it has not."""
        ...


def check_names(weights: GivenWeights, model: PreTrainedModel, twins: Mapping[str, str]) -> dict[str, str]:
    """Hold the names of ``weights`` against those that ``model``, whole, has; no value of a parameter is read.

    Warns, on rank 0, of tensors that the model has no use for.  Returns those ``twins`` (parameter → the name of
    its second copy) that ``weights`` has.  Raises CheckpointError where parameters lack, or where something that losses
    leave out is not zero.
    """
    found = {name: weights.find(name) for name, _ in model.named_parameters()}
    if missing := [name for name, key in found.items() if key is None]:
        raise CheckpointError(
            f"{weights.origin} lacks {len(missing):,} of the model's {len(found):,} parameters: {_examples(missing)}; "
            "give weights of the same model (and, for a head that is its embedding, tie_word_embeddings)"
        )
    for name, buffer in buffers_after_head(model).items():
        if weights.find(name) is not None and weights.read(name, (0,) * buffer.dim(), tuple(buffer.shape)).any():
            raise CheckpointError(f"{name} of {weights.origin} is {AFTER_HEAD}")
    used = {*found.values(), *map(weights.find, (*twins.values(), *lasting_buffers(model)))}
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in needless_names(model)))
    unread = sorted(key for key in weights.keys if key not in used and not ignored.search(key))
    if unread and rank() == 0:
        tensors = f"{len(unread):,} tensor{'s' if len(unread) > 1 else ''}"
        warnings.warn(
            f"{weights.origin} holds {tensors} that the model lacks and that are left out: {_examples(unread)}",
            stacklevel=3,
        )
    return {name: twin for name, twin in twins.items() if weights.find(twin) is not None}


def _examples(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def fill(parameters: list[LocalParameter], weights: Weights, twins: Mapping[str, str] = MappingProxyType({})) -> None:
    """Copy every piece of ``parameters`` from ``weights``; ``twins`` names second copies, which must be equal.

    Raises CheckpointError if a parameter is missing, misshapen, quantised, not finite or unlike its twin.
    """
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
                if value.dtype not in FLOATS:
                    raise CheckpointError(
                        f"weights of {parameter.name} are {str(value.dtype).removeprefix('torch.')}, which mean "
                        "something only with their scales; give fp32, bf16, fp16 or fp64 (dequantise them first)"
                    )
                box(parameter.tensor, piece.local_offset, piece.size).copy_(value)
                if twin := twins.get(parameter.name):
                    _check_twin(parameter.name, twin, value, weights.read(twin, piece.global_offset, piece.size))
            if not is_finite(parameter.tensor):
                raise CheckpointError(
                    f"weights of {parameter.name} hold NaN or inf (in fp32, which training keeps); give sound weights"
                )


def _check_twin(name: str, twin: str, value: torch.Tensor, other: torch.Tensor) -> None:
    if not torch.equal(value.float(), other.float()):
        raise CheckpointError(
            f"weights of {twin} differ from those of {name}, to which the model ties it; set tie_word_embeddings = "
            "false in its config, or give weights without it"
        )


class CompletedWeights:
    """Weights that lack adapters, or parameters named ``new``, which then come from ``own``.

    Those of a model with adapters are found by their names without them too.
    """

    def __init__(self, given: GivenWeights, own: Weights, new: Collection[str] = ()) -> None:
        self._given, self._own, self.new = given, own, frozenset(new)

    @property
    def origin(self) -> str:
        """See GivenWeights."""
        return self._given.origin

    @property
    def keys(self) -> Collection[str]:
        """See GivenWeights."""
        return self._given.keys

    def find(self, name: str) -> str | None:
        """See GivenWeights."""
        return name if self._is_own(name) else self._given.find(self._name(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """See Weights."""
        return self._source(name).shape(self._name(name))

    def read(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """See Weights."""
        return self._source(name).read(self._name(name), offset, size)

    def _name(self, name: str) -> str:
        return plain_name(name) if self._given.find(name) is None else name

    def _source(self, name: str) -> Weights:
        return self._own if self._is_own(name) else self._given

    def _is_own(self, name: str) -> bool:
        lacks = is_adapters(name) and self._own is not self._given and self._given.find(name) is None
        return name in self.new or lacks


class StateDictWeights:
    """Weights already in memory, by Hugging Face name."""

    origin = "the state dict"

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    @property
    def keys(self) -> Collection[str]:
        """See GivenWeights."""
        return self._tensors.keys()

    def find(self, name: str) -> str | None:
        """See GivenWeights."""
        return name if name in self._tensors else None

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
        """Open ``directory``; ``base_prefix`` (``"transformer"``) is what hub files may lack before a name.

        Raises CheckpointError if it has no safetensors or says that they are quantised.
        """
        self._directory = Path(directory)
        _check_unquantised(self._directory)
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

    @property
    def origin(self) -> str:
        """See GivenWeights."""
        return str(self._directory)

    @property
    def keys(self) -> Collection[str]:
        """See GivenWeights."""
        return self._file_of.keys()

    def find(self, name: str) -> str | None:
        """See GivenWeights."""
        return next((key for key in (name, name.removeprefix(self._prefix)) if key in self._file_of), None)

    def _view(self, name: str) -> Any:
        """The tensor ``name`` on disk, of which slices can be read."""
        key = self.find(name)
        if key is None:
            raise CheckpointError(f"{self._directory} lacks {name}; give a checkpoint of the same model")
        file = self._file_of[key]
        try:
            return self._open(file).get_slice(key)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self._directory / file} has no {key} that can be read ({error}); download it again"
            ) from None

    def _index(self) -> dict[str, str]:
        index = self._directory / "model.safetensors.index.json"
        if index.is_file():
            files = _json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise CheckpointError(f"{index} is not a safetensors index; download it again")
            return files
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


def _json(path: Path) -> dict[str, Any]:
    data = parse_json(read_text(path, CheckpointError), str(path), CheckpointError, "download it again")
    return data if isinstance(data, dict) else {}


def _check_unquantised(directory: Path) -> None:
    """By its config; tensors that are no plain numbers are refused when they are read."""
    config = directory / "config.json"
    found = _json(config).get("quantization_config") if config.is_file() else None
    if found is not None:
        method = found.get("quant_method", "some method") if isinstance(found, dict) else found
        raise CheckpointError(
            f"{directory} holds weights quantised by {method} (quantization_config in its config.json), whose numbers "
            "mean something only with their scales; give weights in fp32, bf16, fp16 or fp64"
        )
