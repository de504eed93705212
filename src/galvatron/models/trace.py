"""One forward pass of a twin, watched: which module was called with what, and gave what.

Takes a twin; gives its calls, with their autograd graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .chain import arguments_by_name
from .twin import run_twin


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: its name, its first argument and (first) output.

    ``outputs``: how many it returns in a tuple; 0 for one alone.  ``named``: all its tensors, by argument.  ``saved``:
    how many matrices autograd had kept for the backward when it returned.
    """

    name: str
    module: nn.Module
    argument: Tensor
    output: Tensor
    outputs: int = 0
    named: dict[str, Tensor] = field(default_factory=dict)
    saved: int = 0

    @property
    def is_linear(self) -> bool:
        """Whether it multiplies by a matrix."""
        return isinstance(self.module, (nn.Linear, Conv1D))


@dataclass
class Trace:
    """What happened in one forward pass: modules with parameters of their own, in the order they were called.

    ``ignored``: inputs that are no ids, images or sounds, which the output does not depend on.
    """

    calls: list[Call] = field(default_factory=list)
    logits: Tensor | None = None
    ignored: tuple[str, ...] = ()

    def of(self, module: nn.Module) -> Call:
        """The (first) call of ``module``."""
        return next(call for call in self.calls if call.module is module)

    def place(self, module: nn.Module) -> int:
        """When ``module`` was called: its index in ``calls``."""
        return next(i for i, call in enumerate(self.calls) if call.module is module)


def traced(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Trace:
    """Run a twin once on ``inputs`` and watch."""
    trace, handles, saved = Trace(), [], 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.dim() > 1
        return tensor

    for name, module in model.named_modules():

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            argument = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            value, outputs = (output[0], len(output)) if isinstance(output, tuple) else (output, 0)
            if isinstance(value, Tensor):
                argument = argument if isinstance(argument, Tensor) else value  # some are told of a shape alone
                named = {n: v for n, v in arguments_by_name(module, args, kwargs).items() if isinstance(v, Tensor)}
                trace.calls.append(Call(name, module, argument, value, outputs, named, saved))

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    seen = {name: tensor.requires_grad_() for name, tensor in inputs.items() if tensor.is_floating_point()}
    copies = {name: tensor.clone() for name, tensor in seen.items()}  # some write into what they are given
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        trace.logits = run_twin(model, {**inputs, **copies})
    if seen:
        found = torch.autograd.grad(
            trace.logits.square().sum(), list(seen.values()), retain_graph=True, allow_unused=True
        )
        trace.ignored = tuple(name for name, gradient in zip(seen, found, strict=True) if gradient is None)
    for handle in handles:
        handle.remove()
    return trace
