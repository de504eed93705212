"""What layers are given beside hidden states and that must be in their layout: the states that another stack ends with.

Takes layers whose stack names that argument; gives them this rank's part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from galvatron.models import argument_names

from ..processes.collectives import AxisGroup, own_part
from .forward import wrap_forward


class OwnSide:
    """Makes of whole sequences what layers of one strategy see of them: once a forward, however many layers ask.

    All are given the same, if not the same tensor: FSDP2 hands the layers that it shards aliases of their own.  Of what
    another stage has sent it is made of that, this rank's part already, whatever the layers are given.
    """

    def __init__(
        self,
        sequence: AxisGroup,
        change: Callable[[Tensor], Tensor],
        received: Callable[[], Tensor] | None = None,
    ) -> None:
        """``sequence``: the ranks that have the whole sequences of the same rows; ``change``: to the layers' layout."""
        self._sequence, self._change, self._received = sequence, change, received
        self._own: Tensor | None = None

    def enter(self, layer: nn.Module, name: str) -> None:
        """Let ``layer`` see its part of the argument called ``name``."""
        place = argument_names(type(layer)).index(name)

        def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if place < len(args):
                args = (*args[:place], self._of(args[place]), *args[place + 1 :])
            elif name in kwargs:
                kwargs[name] = self._of(kwargs[name])
            return forward(*args, **kwargs)

        wrap_forward(layer, call)

    def forget(self) -> None:
        """Let go of what layers saw."""
        self._own = None

    def _of(self, whole: Tensor) -> Tensor:
        if self._own is None:
            self._own = self._change(own_part(whole, self._sequence) if self._received is None else self._received())
        return self._own
