"""Run the passes of one stage in schedule order, with messages to its neighbours.

Forward and backward messages have a process group each, and so have those from the last stage to the first.  A rank
hears from one rank in each direction and sends to one, and both go through microbatches and chunks in one order, so
no two ranks ever wait for each other.  A message leaves when the tensor exists: gradients from within the backward,
before the first layer's own gradients are reduced.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron.plan.schedules import Action

from ..losses.balance import Balance
from ..processes.grid import Grid, Neighbour


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


@dataclass(frozen=True)
class Border:
    """What goes into a model chunk of this rank and out of it.

    Attributes:
        in_shape: of a microbatch's hidden states as they come in on this rank.
        is_first, is_last: whether nothing comes in, or goes out but the loss.
        trains_before, trains_until: whether what comes before the chunk, or that and the chunk, has trainable
            parameters: gradients go no further back than the first of them.
        after_gradient: called when the gradient of what came in is on its way.
    """

    in_shape: tuple[int, ...]
    is_first: bool
    is_last: bool
    trains_before: bool = True
    trains_until: bool = True
    after_gradient: Callable[[], None] | None = None


@dataclass
class Messages:
    """Messages of one step: hidden states forward, their gradients backward.

    What was sent is held until it has surely left: a chunk's output until its gradient arrives (it is needed so
    long anyway), a gradient until the next one is sent.  Counts of routers (``losses.balance``) follow each.

    Attributes:
        balance: whose counts travel; None where no backward follows.
        arrived: the counts that came with the last hidden states.
    """

    grid: Grid
    borders: tuple[Border, ...]
    dtype: torch.dtype
    balance: Balance | None = None
    arrived: Tensor | None = None
    _counts: list[tuple[dist.Work, Tensor]] = field(default_factory=list)
    _outputs: dict[tuple[int, int], tuple[dist.Work, Tensor]] = field(default_factory=dict)
    _gradients: deque[tuple[dist.Work, Tensor]] = field(default_factory=deque)

    def receive_hidden(self, chunk: int) -> Inbox:
        """The hidden states that come into ``chunk`` next."""
        before, border = self._before, self.borders[chunk]
        hidden = self._receive(border.in_shape, before.rank, before.forward)
        if self.balance is not None:
            self.arrived = self._receive_counts(self.balance, before.rank, before.forward)
        return Inbox(hidden, partial(self._send_gradient, border) if border.trains_before else None)

    def receive_gradient(self, microbatch: int, chunk: int, like: Tensor) -> Tensor:
        """The gradient of the output ``like`` of ``chunk``."""
        gradient = self._receive(tuple(like.shape), self._after.rank, self._after.backward)
        if self.balance is not None:
            total = self._receive_counts(self.balance, self._after.rank, self._after.backward)
            self.balance.backward(microbatch).total = total
        self.let_go_of_hidden(microbatch, chunk)
        return gradient

    def let_go_of_hidden(self, microbatch: int, chunk: int) -> None:
        """Wait until an output has left, if it was sent, and forget it."""
        if (microbatch, chunk) in self._outputs:
            self._outputs.pop((microbatch, chunk))[0].wait()

    def send_hidden(self, microbatch: int, chunk: int, hidden: Tensor) -> None:
        """Send an output of ``chunk`` on."""
        if not torch.is_grad_enabled() and self._outputs:
            self.let_go_of_hidden(*next(iter(self._outputs)))
        self._outputs[microbatch, chunk] = self._send(hidden.detach(), self._after.rank, self._after.forward)
        if self.balance is not None:
            self._counts.append(self._send(self.balance.now.carried, self._after.rank, self._after.forward))

    def _send_gradient(self, border: Border, gradient: Tensor) -> None:
        """Send the gradient of a chunk's input back; called from within the backward."""
        if self._gradients:
            self._gradients.popleft()[0].wait()
        self._gradients.append(self._send(gradient, self._before.rank, self._before.backward))
        if self.balance is not None:
            total = self.balance.now.total
            assert total is not None
            self._counts.append(self._send(total, self._before.rank, self._before.backward))
        if border.after_gradient is not None:
            border.after_gradient()

    def finish(self) -> None:
        """Wait until everything sent has left."""
        for work, _ in (*self._outputs.values(), *self._gradients, *self._counts):
            work.wait()
        self._counts.clear()
        self._outputs.clear()
        self._gradients.clear()

    @property
    def _before(self) -> Neighbour:
        assert self.grid.before is not None
        return self.grid.before

    @property
    def _after(self) -> Neighbour:
        assert self.grid.after is not None
        return self.grid.after

    def _receive_counts(self, balance: Balance, rank: int, group: dist.ProcessGroup) -> Tensor:
        return self._receive((balance.num_experts,), rank, group, torch.float32)

    def _receive(
        self, shape: tuple[int, ...], rank: int, group: dist.ProcessGroup, dtype: torch.dtype | None = None
    ) -> Tensor:
        buffer = torch.empty(shape, dtype=dtype or self.dtype, device=self.grid.world.device)
        dist.recv(buffer, src=rank, group=group)
        return buffer

    def _send(self, tensor: Tensor, rank: int, group: dist.ProcessGroup) -> tuple[dist.Work, Tensor]:
        tensor = tensor.contiguous()
        work = dist.isend(tensor, dst=rank, group=group)
        assert work is not None
        return work, tensor


Forward = Callable[[int, int, Inbox | None], Tensor]


def run(
    actions: list[Action],
    forward: Forward,
    messages: Messages,
    before_backward: Callable[[int, int, bool], None],
    weight_pass: Callable[[int, bool], None],
) -> list[Tensor]:
    """Run ``actions``; returns the last chunk's losses by microbatch (detached), [] on other ranks.

    What was sent may still be on its way: see ``Messages.finish``.

    Args:
        actions: the passes of this rank in order (plan.schedules).
        forward: (microbatch, chunk, what was received or None) → the chunk's output: hidden states or loss.
        messages: this step's.
        before_backward: called with the microbatch, the chunk and whether it is its last backward of the step, before
            each.
        weight_pass: called with the chunk and whether it is its last weight pass of the step, for each.
    """
    alive: dict[tuple[int, int], Tensor] = {}
    losses: list[Tensor] = []
    left = Counter((action.kind, action.chunk) for action in actions)
    for kind, microbatch, chunk in actions:
        border = messages.borders[chunk]
        left[kind, chunk] -= 1
        if kind == "forward":
            inbox = None if border.is_first else messages.receive_hidden(chunk)
            output = forward(microbatch, chunk, inbox)
            if border.is_last:
                losses.append(output.detach())
            else:
                messages.send_hidden(microbatch, chunk, output)
            if left["backward", chunk]:
                alive[microbatch, chunk] = output
        elif kind == "weight":
            if border.trains_until:
                weight_pass(chunk, left[kind, chunk] == 0)
        else:
            output = alive.pop((microbatch, chunk))
            if not border.trains_until:  # nothing here or before has a gradient, and none comes
                messages.let_go_of_hidden(microbatch, chunk)
                continue
            before_backward(microbatch, chunk, left[kind, chunk] == 0)
            gradient = None if border.is_last else messages.receive_gradient(microbatch, chunk, output)
            torch.autograd.backward(output, gradient)
            del output, gradient  # or they would live on through the next forward
    return losses
