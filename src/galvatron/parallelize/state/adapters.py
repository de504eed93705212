"""Exports of models with adapters: merged into the linears they are beside, or alone as peft writes them.

Takes whole tensors by name, one at a time and in any order; a few are held until what they are merged with is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from galvatron.core.errors import ConfigError
from galvatron.core.files import check_folder, new_folder, write_atomic
from galvatron.core.lora import is_adapters, plain_name
from galvatron.models import Adapter

from .safetensors_file import Entry, fsync_directory, write_safetensors

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the names of a model that it wraps."""
_PART = re.compile(r"(?P<path>.+)\.(?:base_layer\.weight|lora_(?P<matrix>[AB])\.(?P<name>[^.]+)\.weight)")
Shapes = Mapping[str, tuple[int, ...]]


def adapter_name(parameters: Iterable[str]) -> str | None:
    """What an adapter is called, by the names of a model's parameters; None where they have none."""
    found = (match["name"] for name in parameters if (match := _PART.fullmatch(name)) and match["matrix"])
    return next(found, None)


def merged_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Of the model without adapters: shapes by name, in the order in which ``merge`` gives its tensors."""
    return {plain_name(sources[0]): shapes[sources[0]] for sources in _merged(shapes)}


def merge(shapes: Shapes, tensors: Iterator[Tensor], adapter: Adapter) -> Iterator[Tensor]:
    """W + s · B A of every linear with an adapter, all else as it is; ``tensors`` come in the order of ``shapes``."""
    named, held = zip(shapes, tensors, strict=True), dict[str, Tensor]()
    for sources in _merged(shapes):
        while not held.keys() >= set(sources):
            name, tensor = next(named)
            held[name] = tensor
        weight, *adapters = (held.pop(source) for source in sources)
        if adapters:
            down, up = adapters
            path = sources[0].removesuffix(".base_layer.weight")
            added = (up @ down) * adapter.scaling[path]
            weight = weight + (added.t() if path in adapter.transposed else added)
        yield weight


def _merged(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """What every parameter of the plain model is made of: itself, or W, A and B, as soon as all three were named."""
    waiting: dict[str, dict[str | None, str]] = {}
    for name in names:
        match = _PART.fullmatch(name)
        if match is None:
            yield (name,)
            continue
        parts = waiting.setdefault(match["path"], {})
        parts[match["matrix"]] = name
        if len(parts) == 3:
            yield parts[None], parts["A"], parts["B"]


def check_alone(trained: Iterable[str]) -> None:
    """Raise ConfigError if an adapter alone would lack some of the ``trained`` parameters."""
    others = [name for name in trained if not is_adapters(name)]
    if others:
        raise ConfigError(
            f"an adapter alone would lack {len(others):,} trained parameters beside it, such as {others[0]}; export "
            "the model merged"
        )


def write_adapter(
    directory: Path, adapter: Adapter, shapes: Shapes, tensors: Iterator[Tensor], dtype: torch.dtype, tokenizer: Any
) -> None:
    """Write ``tensors``, A and B of every linear, as ``PeftModel.from_pretrained`` takes them.

    ``directory`` must be new or empty and appears whole or not at all.
    Raises OutputError if it is not empty or the disk refuses.
    """
    check_folder(directory, "an export's directory", new=True)
    entries = [Entry(PREFIX + name.replace(f".{adapter.name}.", "."), dtype, shape) for name, shape in shapes.items()]
    with new_folder(directory) as temporary:
        write_safetensors(temporary / ADAPTER_WEIGHTS, entries, tensors)
        write_atomic(temporary / ADAPTER_CONFIG, adapter.json)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        fsync_directory(temporary)
