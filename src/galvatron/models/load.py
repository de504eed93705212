"""Configs by file, directory or hub name, and models whose parameters take no memory."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from galvatron.core.errors import ConfigError
from galvatron.internals import put_parameter

from .family import family_of


def load_config(path: str | Path) -> PretrainedConfig:
    """The Hugging Face config at a ``config.json``, a local directory or a hub name.

    Raises:
        ConfigError: it cannot be read, or its family is not supported.
    """
    if Path(path).suffix == ".json" and not Path(path).is_file():
        raise ConfigError(f"{path} does not exist; check the path")  # and not a hub name to ask the network for
    try:
        config = _config_from_file(Path(path)) if Path(path).is_file() else AutoConfig.from_pretrained(str(path))
    except ConfigError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and hub errors here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"model {str(path)!r} has no readable config ({reason}); give a config.json") from None
    family_of(config)
    return config


def _config_from_file(path: Path) -> PretrainedConfig:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        model_type = data.pop("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); give a Hugging Face config.json") from None
    except KeyError:
        raise ConfigError(f"{path} lacks model_type; give a Hugging Face config.json") from None
    return AutoConfig.for_model(model_type, **data)


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model of ``config``: float32 parameters on meta, buffers real (rotary tables).

    ``config`` itself stays as it is: transformers writes dtype and attention into the one it is given.
    """
    with _parameters_on_meta():
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within, this thread's new parameters move to meta as they are registered; buffers stay where they are made."""
    original, thread = nn.Module.register_parameter, threading.get_ident()

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        # a tied parameter is on meta already and stays shared
        if param is not None and not param.is_meta and threading.get_ident() == thread:
            put_parameter(module, name, nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad))

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
