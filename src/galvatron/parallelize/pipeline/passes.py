"""Run the passes of one stage in schedule order, with messages to its neighbours.

Forward and backward messages have a process group each, and within a direction microbatches are sent and
received in order, so no two ranks ever wait for each other.  A message leaves when the tensor exists: gradients from
within the backward, before the first layer's own gradients are reduced.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron.plan.schedules import Action

from ..processes.grid import Grid


class Inbox:
    """A microbatch's hidden states as received; their gradient is sent back, if it is, as soon as autograd has it."""

    def __init__(self, hidden: Tensor, send_gradient: Callable[[Tensor], None] | None) -> None:
        self._hidden: Tensor | None = hidden
        self._send_gradient = send_gradient

    @property
    def shape(self) -> torch.Size:
        """Of the hidden states."""
        assert self._hidden is not None
        return self._hidden.shape

    def new_zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Zeros on the same device in the same dtype."""
        assert self._hidden is not None
        return self._hidden.new_zeros(shape)

    def open(self) -> Tensor:
        """The hidden states, once: from then on only autograd keeps them, and only if their values are needed."""
        assert self._hidden is not None
        hidden, self._hidden = self._hidden, None
        if self._send_gradient is None or not torch.is_grad_enabled():
            return hidden
        anchor = torch.empty((), device=hidden.device, requires_grad=True)
        opened: Tensor = _Open.apply(anchor, hidden, self._send_gradient)
        return opened


class _Open(torch.autograd.Function):
    # a leaf would be kept alive by its own gradient accumulator
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, hidden: Tensor, send_gradient: Callable[[Tensor], None]) -> Tensor:
        ctx.send_gradient = send_gradient
        return hidden

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.send_gradient(gradient)
        return None, None, None


Forward = Callable[[int, Inbox | None], Tensor]


@dataclass
class Neighbours:
    """Messages of one step: hidden chunks forward, their gradients backward.

    What was sent is held until it has surely left: a stage output until its gradient arrives (it is needed so
    long anyway), a gradient until the next one is sent.

    ``trains_before``, ``trains_until``: whether stages before this one, or this one and those before, have trainable
    parameters: gradients go no further back than the first of them.
    ``after_gradient``: called when a gradient is on its way.
    """

    grid: Grid
    in_shape: tuple[int, ...]
    dtype: torch.dtype
    trains_before: bool = True
    trains_until: bool = True
    after_gradient: Callable[[], None] | None = None
    _outputs: deque[tuple[dist.Work, Tensor]] = field(default_factory=deque)
    _gradients: deque[tuple[dist.Work, Tensor]] = field(default_factory=deque)

    def receive_hidden(self) -> Inbox:
        """The next microbatch's hidden states from the previous stage."""
        hidden = self._receive(self.in_shape, self.grid.stage - 1, self.grid.forward_group)
        return Inbox(hidden, self._send_gradient if self.trains_before else None)

    def receive_gradient(self, like: Tensor) -> Tensor:
        """The gradient of the stage output ``like`` from the next stage."""
        gradient = self._receive(tuple(like.shape), self.grid.stage + 1, self.grid.backward_group)
        self.let_go_of_hidden()
        return gradient

    def let_go_of_hidden(self) -> None:
        """Wait until the oldest stage output has left, and forget it."""
        _let_go(self._outputs)

    def send_hidden(self, hidden: Tensor) -> None:
        """Send a stage output on."""
        if not torch.is_grad_enabled():
            _let_go(self._outputs)
        self._outputs.append(self._send(hidden.detach(), self.grid.stage + 1, self.grid.forward_group))

    def _send_gradient(self, gradient: Tensor) -> None:
        """Send the gradient of a stage input back; called from within the backward."""
        _let_go(self._gradients)
        self._gradients.append(self._send(gradient, self.grid.stage - 1, self.grid.backward_group))
        if self.after_gradient is not None:
            self.after_gradient()

    def finish(self) -> None:
        """Wait until everything sent has left."""
        while self._outputs or self._gradients:
            _let_go(self._outputs)
            _let_go(self._gradients)

    def _receive(self, shape: tuple[int, ...], stage: int, group: dist.ProcessGroup | None) -> Tensor:
        buffer = torch.empty(shape, dtype=self.dtype, device=self.grid.world.device)
        dist.recv(buffer, src=self.grid.column[stage], group=group)
        return buffer

    def _send(self, tensor: Tensor, stage: int, group: dist.ProcessGroup | None) -> tuple[dist.Work, Tensor]:
        tensor = tensor.contiguous()
        work = dist.isend(tensor, dst=self.grid.column[stage], group=group)
        assert work is not None
        return work, tensor


def _let_go(sent: deque[tuple[dist.Work, Tensor]]) -> None:
    """Wait for the oldest message, if any, and forget it."""
    if sent:
        sent.popleft()[0].wait()


def run(
    actions: list[Action], forward: Forward, neighbours: Neighbours, before_backward: Callable[[bool], None]
) -> list[Tensor]:
    """Run ``actions``; returns the last stage's losses by microbatch (detached), [] elsewhere.

    What was sent may still be on its way: see ``Neighbours.finish``.

    Args:
        actions: the passes of this stage in order (plan.schedules).
        forward: (microbatch, what was received or None) → stage output: hidden states or loss.
        neighbours: this step's messages.
        before_backward: called with whether it is the step's last backward, before each.
    """
    grid = neighbours.grid
    alive: dict[int, Tensor] = {}
    losses: list[Tensor] = []
    backwards_left = sum(action.kind == "backward" for action in actions)
    for action in actions:
        if action.kind == "forward":
            inbox = None if grid.is_first else neighbours.receive_hidden()
            output = forward(action.microbatch, inbox)
            if grid.is_last:
                losses.append(output.detach())
            else:
                neighbours.send_hidden(output)
            if backwards_left:
                alive[action.microbatch] = output
        else:
            output = alive.pop(action.microbatch)
            backwards_left -= 1
            if not neighbours.trains_until:  # nothing here or before has a gradient, and none comes
                neighbours.let_go_of_hidden()
                continue
            before_backward(backwards_left == 0)
            gradient = None if grid.is_last else neighbours.receive_gradient(output)
            torch.autograd.backward(output, gradient)
            del output, gradient  # or they would live on through the next forward
    return losses
