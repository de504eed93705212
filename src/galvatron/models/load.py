"""Configs by file, directory or hub name, and models whose parameters take no memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from galvatron.core.errors import ConfigError
from galvatron.core.numbers import MAX_LAYERS
from galvatron.core.parsing import is_file, parse_json, read_text
from galvatron.core.tasks import Task
from galvatron.core.words import shown
from galvatron.internals import keep_made, put_parameter

from .family import family_of
from .staged import check_stages
from .tasks import auto_class, for_task, task_of

LAYER_COUNTS = frozenset({"num_hidden_layers", "n_layer"})
MAX_REASON = 200  # characters of a library's message
MAX_KEPT = 1 << 16
"""Elements of a value that a module is made with, which is its initial one if nothing else is (a contrast's scale)."""


def load_config(path: str | Path, task: Task | None = None, num_labels: int | None = None) -> PretrainedConfig:
    """The Hugging Face config at a ``config.json``, a local directory or a hub name.

    For another ``task`` than it names, and with as many classes, if they are given.

    Raises:
        ConfigError: it cannot be read, its family is not supported, or has no model for the task.
    """
    config = _read_config(path)
    config = config if task is None else for_task(config, task)
    if num_labels is not None:
        config.num_labels = num_labels
    family_of(config)
    return config


def _read_config(path: str | Path) -> PretrainedConfig:
    if Path(path).suffix == ".json" and not is_file(str(path)):
        raise ConfigError(f"{path} does not exist; check the path")  # and not a hub name to ask the network for
    inside = Path(path) / "config.json"
    try:
        if is_file(str(inside)):
            _read(inside)
        config = _config_from_file(Path(path)) if is_file(str(path)) else AutoConfig.from_pretrained(str(path))
    except ConfigError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and hub errors here
        raise ConfigError(
            f"model {str(path)!r} has no readable config ({_reason(error)}); give a config.json"
        ) from None
    return config


def class_names(config: PretrainedConfig) -> tuple[str, ...]:
    """What ``config`` calls its classes, by number."""
    names: dict[Any, str] = dict(config.id2label or {})
    return tuple(names.get(number, f"LABEL_{number}") for number in range(config.num_labels or 0))


def name_classes(config: PretrainedConfig, names: Sequence[str]) -> None:
    """Let ``config`` call its classes ``names``, by number."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def described_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The parameters of the model that a config itself describes, whatever task it is for, named as in a whole model.

    Raises:
        ConfigError: it cannot be read, or transformers cannot build what it describes.
    """
    config = _read_config(path)
    named = (getattr(config, "architectures", None) or [""])[0]
    architecture = getattr(transformers, named, None)
    model = meta_model(config) if architecture is None else _on_meta(lambda: architecture(config), config)
    prefix = f"{model.base_model_prefix}." if model.base_model is model and model.base_model_prefix else ""
    return {f"{prefix}{name}": tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _config_from_file(path: Path) -> PretrainedConfig:
    data = _read(path)
    return AutoConfig.for_model(data.pop("model_type"), **data)


def _read(path: Path) -> dict[str, Any]:
    """The object in a ``config.json``; transformers lists all its layers at once, so that they are counted here."""
    data = parse_json(read_text(path, ConfigError), str(path), ConfigError, "give a Hugging Face config.json")
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise ConfigError(f"{path} lacks model_type; give a Hugging Face config.json")
    for name in LAYER_COUNTS & data.keys():
        _check_layers(data[name])
    return data


def _check_layers(count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_LAYERS:
        raise ConfigError(f"a model has 1 to {MAX_LAYERS:,} layers, got {shown(count)}; mend its config.json")


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model of ``config`` for its task: float32 parameters on meta, buffers real (rotary tables).

    ``config`` itself stays as it is: transformers writes dtype and attention into the one it is given.
    """
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if (count := getattr(part, "num_hidden_layers", None)) is not None:
            _check_layers(count)
    check_stages(config)
    return _on_meta(
        lambda: auto_class(config).from_config(for_task(config, task_of(config)), dtype=torch.float32), config
    )


def _on_meta(build: Callable[[], PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    try:
        with _parameters_on_meta(), _EmptyOnMeta():
            return build()
    except Exception as error:  # what torch and transformers raise where sizes are none, or contradict each other
        raise ConfigError(
            f"transformers cannot build the {config.model_type} that its config describes ({_reason(error)}); "
            "mend its config.json"
        ) from None


def _reason(error: Exception) -> str:
    """The first line of what a library says, or at least its class."""
    lines = str(error).strip().splitlines()
    return lines[0][:MAX_REASON] if lines else type(error).__name__


DRAWS = ("normal_", "uniform_", "trunc_normal_", "xavier_uniform_", "kaiming_uniform_")
"""What draws values, of tensors and of torch.nn.init."""


class _EmptyOnMeta(TorchFunctionMode):
    """Within, new parameters take no memory even before they are registered.

    On meta there is nothing to draw, which torch takes a millisecond a parameter for.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "") in DRAWS and isinstance(drawn, torch.Tensor) and drawn.is_meta:
            return drawn
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within, this thread's new parameters move to meta as they are registered; buffers stay where they are made."""
    original, thread = nn.Module.register_parameter, threading.get_ident()

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        # a tied parameter is on meta already and stays shared
        if param is not None and not param.is_meta and threading.get_ident() == thread:
            moved = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            if param.numel() <= MAX_KEPT:
                keep_made(moved, param.detach())
            put_parameter(module, name, moved)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
