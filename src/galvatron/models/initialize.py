"""Initial weights that depend on the seed and the parameter's name alone, never on the plan.

Hugging Face's own initialisation runs once on meta tensors while a dispatch mode writes down what it does
to every parameter (``normal_(0, 0.02)``, then ``zero_`` of the padding row, ...).  Any one parameter can
then be made on its own, whole, with its own generator.  What is done to none keeps the value that its module made it
with.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from galvatron.core.errors import ConfigError
from galvatron.internals import (
    TorchDispatchMode,
    changes_in_place,
    made_value,
    noted_initialisers,
    put_parameter,
    takes_generator,
    to_be_initialised,
    viewed,
)

from .lora import start_adapters


@dataclass(frozen=True)
class _Step:
    """One in-place operation on a (view of a) parameter."""

    op: Any  # a torch.ops overload, or a function of torch.nn.init
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(TorchDispatchMode):
    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.steps: dict[str, list[_Step]] = {name: [] for name in names.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if changes_in_place(func) and isinstance(args[0], torch.Tensor):
            self.note(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def note(self, op: Any, target: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        name = self.names.get(id(target)) or self.names.get(id(viewed(target)))
        if name is not None:
            size, stride, offset = tuple(target.shape), tuple(target.stride()), int(target.storage_offset())
            self.steps[name].append(_Step(op, size, stride, offset, args, kwargs))


@contextmanager
def _untied(model: PreTrainedModel) -> Iterator[None]:
    """Within, parameters of several names have the first of them alone: what is done to others is done to nothing."""
    seen: set[int] = set()
    tied: list[tuple[nn.Module, str, nn.Parameter]] = []
    for name, parameter in [*model.named_parameters(remove_duplicate=False)]:
        if id(parameter) in seen:
            path, _, own = name.rpartition(".")
            tied.append((model.get_submodule(path), own, parameter))
        seen.add(id(parameter))
    for module, own, parameter in tied:
        put_parameter(module, own, nn.Parameter(torch.empty_like(parameter)))
    try:
        yield
    finally:
        for module, own, parameter in tied:
            put_parameter(module, own, parameter)


class InitialWeights:
    """The initial value of any parameter of a meta model, made when asked for."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        """Record how ``model`` (parameters on meta) initialises itself.

        Raises:
            ConfigError: it computes a value from tensors, which have none on meta.
        """
        parameters = dict(model.named_parameters())
        for module in model.modules():
            to_be_initialised(module)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        recorder = _Recorder({id(p): name for name, p in parameters.items()})
        with _untied(model), recorder, noted_initialisers(recorder.note):
            model.initialize_weights()
            start_adapters(model)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for name, steps in recorder.steps.items():
            if any(isinstance(given, torch.Tensor) and given.is_meta for step in steps for given in step.args):
                raise ConfigError(
                    f"the initial value of {name} is computed by {type(model).__name__} itself, from a whole model; "
                    "start from a checkpoint instead (weights)"
                )
        self._shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        self._steps, self._type = recorder.steps, type(model).__name__
        self._made = {name: made_value(p) for name, p in parameters.items() if not recorder.steps[name]}
        self._seed = seed

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of parameter ``name``."""
        return self._shapes[name]

    def read(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """The box of parameter ``name`` at ``offset`` of ``size``, float32 on the CPU."""
        value = self._whole(name)
        for dim, (start, length) in enumerate(zip(offset, size, strict=True)):
            value = value.narrow(dim, start, length)
        return value

    def _whole(self, name: str) -> torch.Tensor:
        if name in self._made:
            return self._as_made(name)
        # the CPU generator keeps 32 bits of a seed; crc32 is stable across processes and runs, unlike hash()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        value = torch.zeros(self._shapes[name])
        for step in self._steps[name]:
            kwargs = {**step.kwargs, "generator": generator} if takes_generator(step.op) else step.kwargs
            step.op(value.as_strided(step.size, step.stride, step.offset), *step.args, **kwargs)
        return value

    def _as_made(self, name: str) -> torch.Tensor:
        value = self._made[name]
        if value is None:
            raise ConfigError(
                f"{self._type} gives {name} no initial value but when it is made, which a model on meta has lost; "
                "build it on the CPU, or start from a checkpoint (weights)"
            )
        return value.float().clone()
