"""Run the passes of one stage in schedule order, with messages to its neighbours.

Forward and backward messages have a process group each, and within a direction microbatches are sent and
received in order, so no two ranks ever wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron.plan.schedules import Action

from .grid import Grid

Forward = Callable[[int, Tensor | None], Tensor]


@dataclass
class Neighbours:
    """Messages of one step: hidden chunks forward, their gradients backward."""

    grid: Grid
    in_shape: tuple[int, ...]
    dtype: torch.dtype
    _sent: list[tuple[dist.Work, Tensor]] = field(default_factory=list)

    def receive_hidden(self) -> Tensor:
        """The next microbatch's hidden states from the previous stage: a leaf that asks for its gradient."""
        hidden = self._receive(self.in_shape, self.grid.stage - 1, self.grid.forward_group)
        return hidden.requires_grad_(torch.is_grad_enabled())

    def receive_gradient(self, like: Tensor) -> Tensor:
        """The gradient of the stage output ``like`` from the next stage."""
        return self._receive(tuple(like.shape), self.grid.stage + 1, self.grid.backward_group)

    def send_hidden(self, hidden: Tensor) -> None:
        """Send a stage output on."""
        self._send(hidden.detach(), self.grid.stage + 1, self.grid.forward_group)

    def send_gradient(self, gradient: Tensor) -> None:
        """Send the gradient of a stage input back."""
        self._send(gradient, self.grid.stage - 1, self.grid.backward_group)

    def finish(self) -> None:
        """Wait until everything sent has left."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _receive(self, shape: tuple[int, ...], stage: int, group: dist.ProcessGroup | None) -> Tensor:
        buffer = torch.empty(shape, dtype=self.dtype, device=self.grid.world.device)
        dist.recv(buffer, src=self.grid.column[stage], group=group)
        return buffer

    def _send(self, tensor: Tensor, stage: int, group: dist.ProcessGroup | None) -> None:
        tensor = tensor.contiguous()
        work = dist.isend(tensor, dst=self.grid.column[stage], group=group)
        assert work is not None
        self._sent.append((work, tensor))


def run(
    actions: list[Action], forward: Forward, neighbours: Neighbours, before_backward: Callable[[bool], None]
) -> list[Tensor]:
    """Run ``actions``; returns the last stage's losses by microbatch (detached), [] elsewhere.

    Args:
        actions: the passes of this stage in order (plan.schedules).
        forward: (microbatch, received hidden states or None) → stage output: hidden states or loss.
        neighbours: this step's messages.
        before_backward: called with whether it is the step's last backward, before each.
    """
    grid = neighbours.grid
    alive: dict[int, tuple[Tensor | None, Tensor]] = {}
    losses: list[Tensor] = []
    backwards_left = sum(action.kind == "backward" for action in actions)
    for action in actions:
        if action.kind == "forward":
            received = None if grid.is_first else neighbours.receive_hidden()
            output = forward(action.microbatch, received)
            if grid.is_last:
                losses.append(output.detach())
            else:
                neighbours.send_hidden(output)
            if backwards_left:
                alive[action.microbatch] = (received, output)
        else:
            received, output = alive.pop(action.microbatch)
            backwards_left -= 1
            before_backward(backwards_left == 0)
            gradient = None if grid.is_last else neighbours.receive_gradient(output)
            torch.autograd.backward(output, gradient)
            if received is not None:
                assert received.grad is not None
                neighbours.send_gradient(received.grad)
    neighbours.finish()
    return losses
