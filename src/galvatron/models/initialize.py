"""Initial weights that depend on the seed and the parameter's name alone, never on the plan.

Hugging Face's own initialisation runs once on meta tensors while a dispatch mode writes down what it does
to every parameter (``normal_(0, 0.02)``, then ``zero_`` of the padding row, ...).  Any one parameter can
then be made on its own, whole, with its own generator.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from galvatron.core.errors import ConfigError
from galvatron.internals import TorchDispatchMode, changes_in_place, takes_generator, to_be_initialised, viewed

from .lora import start_adapters


@dataclass(frozen=True)
class _Step:
    """One in-place operation on a (view of a) parameter."""

    op: Any  # a torch.ops overload
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
            target = args[0]
            name = self.names.get(id(target)) or self.names.get(id(viewed(target)))
            if name is not None:
                size, stride, offset = tuple(target.shape), tuple(target.stride()), int(target.storage_offset())
                self.steps[name].append(_Step(func, size, stride, offset, tuple(args[1:]), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


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
        with _Recorder({id(p): name for name, p in parameters.items()}) as recorder:
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
        self._steps = recorder.steps
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
        # the CPU generator keeps 32 bits of a seed; crc32 is stable across processes and runs, unlike hash()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}/{name}".encode()))
        value = torch.zeros(self._shapes[name])
        for step in self._steps[name]:
            kwargs = {**step.kwargs, "generator": generator} if takes_generator(step.op) else step.kwargs
            step.op(value.as_strided(step.size, step.stride, step.offset), *step.args, **kwargs)
        return value
