"""A unit of a model in the memory of one rank: what is measured and counted.

Takes modules cut already; gives them parameters, inputs and levels of recompute.  Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from galvatron.core.model import Recompute
from galvatron.internals import put_buffer, put_parameter, tree_map_only
from galvatron.parallelize.pipeline.stage import Stage

BIAS = "position_bias"
INITIAL_STD = 0.02  # as transformers initialises: activations keep ordinary magnitudes


class LocalUnit(nn.Module):
    """A unit with the inputs that do not change from one microbatch to the next.

    Attributes:
        owners: the modules that hold its parameters.
        forwards: of a layer, its forward at every level of recompute.
        experts: of a layer, the module of its experts, if any.
    """

    def __init__(self, inner: nn.Module, owners: tuple[nn.Module, ...], args: tuple[Any, ...], **kwargs: Any) -> None:
        super().__init__()
        self.inner, self.owners = inner, owners
        self.args, self.kwargs = args, kwargs
        self.forwards: dict[Recompute, Callable[..., Any]] = {}
        self.experts: nn.Module | None = None

    @property
    def levels(self) -> list[Recompute]:
        """The levels of recompute that it can run at."""
        return list(self.forwards) or ["none"]

    def recompute(self, level: Recompute) -> None:
        """Let a layer run at ``level`` from now on."""
        if self.forwards:
            self.inner.forward = self.forwards[level]

    def forward(self, tokens: Tensor, **labels: Tensor) -> Tensor:
        """Ids [B, S] or hidden states [B, S/tp, H] → hidden states [B, S/tp, H] or a scalar loss."""
        output = self.inner(tokens, *self.args, **{**self.kwargs, **labels})
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def side_inputs(self) -> list[Tensor]:
        """The tensors among the unchanging inputs: shared by all layers of a stage (rotary tables)."""
        found: list[Tensor] = []
        tree_map_only(Tensor, found.append, (self.args, self.kwargs))
        return found

    def learnt_inputs(self) -> list[Tensor]:
        """Those among them that get a gradient: a bias of scores that the first layer makes for all."""
        return [self.kwargs[BIAS]] if isinstance(self.kwargs.get(BIAS), Tensor) else []

    def early_gradients(self) -> list[Tensor]:
        """Gradients of parameters that are there before the backward pass."""
        return self.inner.early_gradient.tensors() if isinstance(self.inner, Stage) else []

    def allocate(self, dtype: torch.dtype, device: torch.device, place: Callable[[Tensor], Tensor]) -> None:
        """Give the parameters memory and values; ``place`` takes buffers and side inputs where they are needed."""
        made: dict[int, nn.Parameter] = {}
        for module in [*self.modules(), *self.owners]:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in made:
                    value = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0, INITIAL_STD)
                    new = nn.Parameter(value, requires_grad=parameter.requires_grad)
                    made |= {id(parameter): new, id(new): new}
                put_parameter(module, name, made[id(parameter)])
        self.place_inputs(dtype, place)

    def place_inputs(self, dtype: torch.dtype, place: Callable[[Tensor], Tensor]) -> None:
        """Take buffers and side inputs where they are needed, these in ``dtype``: FSDP2 casts what modules see."""
        for module in self.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                put_buffer(module, name, place(buffer))

        def given(own: Tensor) -> Tensor:
            placed = place(own)
            return placed.to(dtype) if placed.is_floating_point() else placed

        self.args, self.kwargs = tree_map_only(Tensor, given, (self.args, self.kwargs))
        for learnt in self.learnt_inputs():
            learnt.requires_grad_()
