"""What stands in the place of modules whose parameters other stages have: the module itself, another forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from galvatron.internals import tree_map_only
from galvatron.models import Reached


class Zeros:
    """Gives zeros of the shapes that a module's outputs have, in no memory; found by running a copy on meta.

    Numbers are of ``dtype()``, the one that layers compute in.
    """

    def __init__(self, module: nn.Module, dtype: Callable[[], torch.dtype]) -> None:
        self._twin, self._module, self._dtype = copy.deepcopy(module).to("meta"), module, dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The zeros for a call of the module."""
        devices: list[torch.device] = []
        tree_map_only(Tensor, lambda given: devices.append(given.device), (args, kwargs))
        devices += [parameter.device for parameter in self._module.parameters()]  # some are told of a shape alone
        args, kwargs = tree_map_only(Tensor, self._bare, (args, kwargs))
        with torch.no_grad():
            outputs = self._twin.to(self._dtype())(*args, **kwargs)

        def zeros(made: Tensor) -> Tensor:
            dtype = self._dtype() if made.is_floating_point() else made.dtype
            return torch.zeros((), dtype=dtype, device=devices[0]).expand(made.shape)

        return tree_map_only(Tensor, zeros, outputs)

    def _bare(self, given: Tensor) -> Tensor:
        """On meta; in the layers' precision, since a model may have cast it to that of a weight which is not here."""
        return given.to("meta", self._dtype() if given.is_floating_point() else given.dtype)


def call_with(forward: Callable[..., Any], change: Callable[[Tensor], Tensor], args: Any, kwargs: Any) -> Any:
    """``forward`` of the arguments of a layer, after a ``change`` of its hidden states."""
    if args:
        return forward(change(args[0]), *args[1:], **kwargs)
    return forward(**{**kwargs, "hidden_states": change(kwargs["hidden_states"])})


def hidden_of(args: Any, kwargs: Any) -> Tensor:
    """The hidden states among the arguments of a layer."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def pass_on(outputs: int, *args: Any, **kwargs: Any) -> Any:
    """What a layer of another stage gives: the hidden states that it takes."""
    hidden = hidden_of(args, kwargs)
    return (hidden, *(None,) * (outputs - 1)) if outputs else hidden


def end_with(*args: Any, **kwargs: Any) -> None:
    """In the place of the next stage's first layer: end the forward with what enters it."""
    raise Reached(hidden_of(args, kwargs))
