"""Run the passes of one stage in schedule order, with messages to its neighbours.

Forward and backward messages have a process group each, and so have those from the last stage to the first.  A rank
hears from one rank in each direction and sends to one, and both go through microbatches and chunks in one order, so
no two ranks ever wait for each other.  A message leaves when the tensor exists: gradients from within the backward,
before the first layer's own gradients are reduced.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron.plan.schedules import Action, on_their_way

from ..losses.balance import Balance
from ..processes.grid import Grid, Neighbour

Outputs = tuple[Tensor, ...]
"""Of a chunk: hidden states and what later layers need beside them, or the loss."""
Sent = tuple[dist.Work, Tensor]


class Inbox:
    """What was received of a microbatch, hidden states first; gradients go back as soon as autograd has them all."""

    def __init__(self, tensors: Outputs, send_gradients: Callable[[Outputs], None] | None) -> None:
        self._tensors = tensors
        self._send_gradients = send_gradients

    @property
    def shape(self) -> torch.Size:
        """Of the hidden states."""
        return self._tensors[0].shape

    def new_zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Zeros on the same device in the same dtype."""
        return self._tensors[0].new_zeros(shape)

    def open(self) -> Outputs:
        """The tensors, once: from then on only autograd keeps them, and only if their values are needed."""
        tensors, self._tensors = self._tensors, ()
        if self._send_gradients is None or not torch.is_grad_enabled():
            return tensors
        anchor = torch.empty((), device=tensors[0].device, requires_grad=True)
        opened: Outputs = _Open.apply(anchor, self._send_gradients, *tensors)
        return opened


class _Open(torch.autograd.Function):
    # a leaf would be kept alive by its own gradient accumulator
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, send_gradients: Callable[[Outputs], None], *tensors: Tensor) -> Outputs:
        ctx.send_gradients = send_gradients
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        ctx.send_gradients(gradients)
        return (None,) * (2 + len(gradients))


@dataclass(frozen=True)
class Border:
    """What goes into a model chunk of this rank and out of it.

    Attributes:
        in_shapes: of a microbatch's hidden states as they come in on this rank, and of what comes with them.
        is_first, is_last: whether nothing comes in, or goes out but the loss.
        trains_before, trains_until: whether what comes before the chunk, or that and the chunk, has trainable
            parameters: gradients go no further back than the first of them.
        after_gradient: called when the gradient of what came in is on its way.
    """

    in_shapes: tuple[tuple[int, ...], ...]
    is_first: bool
    is_last: bool
    trains_before: bool = True
    trains_until: bool = True
    after_gradient: Callable[[], None] | None = None


@dataclass
class Messages:
    """Messages of one step: hidden states forward, with what later layers need beside them, their gradients backward.

    What was sent is held until it has surely left: a chunk's outputs until their gradients arrive (they are needed so
    long anyway), gradients until as many later ones are sent as may be ``on_their_way``.  Counts of routers
    (``losses.balance``) follow each.

    Attributes:
        balance: whose counts travel; None where no backward follows.
        arrived: the counts that came with the last hidden states.
    """

    grid: Grid
    borders: tuple[Border, ...]
    dtype: torch.dtype
    balance: Balance | None = None
    arrived: Tensor | None = None
    _counts: list[Sent] = field(default_factory=list)
    _outputs: dict[tuple[int, int], list[Sent]] = field(default_factory=dict)
    _gradients: deque[list[Sent]] = field(default_factory=deque)

    def receive_hidden(self, chunk: int) -> Inbox:
        """What comes into ``chunk`` next."""
        before, border = self._before, self.borders[chunk]
        tensors = tuple(self._receive(shape, before.rank, before.forward) for shape in border.in_shapes)
        if self.balance is not None:
            self.arrived = self._receive_counts(self.balance, before.rank, before.forward)
        return Inbox(tensors, partial(self._send_gradients, border) if border.trains_before else None)

    def receive_gradients(self, microbatch: int, chunk: int, like: Outputs) -> Outputs:
        """The gradients of the outputs ``like`` of ``chunk``."""
        after = self._after
        gradients = tuple(self._receive(tuple(output.shape), after.rank, after.backward) for output in like)
        if self.balance is not None:
            total = self._receive_counts(self.balance, after.rank, after.backward)
            self.balance.backward(microbatch).total = total
        self.let_go_of_hidden(microbatch, chunk)
        return gradients

    def let_go_of_hidden(self, microbatch: int, chunk: int) -> None:
        """Wait until outputs have left, if they were sent, and forget them."""
        for work, _ in self._outputs.pop((microbatch, chunk), ()):
            work.wait()

    def send_hidden(self, microbatch: int, chunk: int, outputs: Outputs) -> None:
        """Send the outputs of ``chunk`` on."""
        if not torch.is_grad_enabled() and self._outputs:
            self.let_go_of_hidden(*next(iter(self._outputs)))
        after = self._after
        sent = [self._send(output.detach(), after.rank, after.forward) for output in outputs]
        self._outputs[microbatch, chunk] = sent
        if self.balance is not None:
            self._counts.append(self._send(self.balance.now.carried, after.rank, after.forward))

    def _send_gradients(self, border: Border, gradients: Outputs) -> None:
        """Send the gradients of a chunk's inputs back; called from within the backward."""
        before = self._before
        plan = self.grid.plan
        if len(self._gradients) == on_their_way(plan.pp, plan.model_chunks) * max(plan.model_chunks - 1, 1):
            for work, _ in self._gradients.popleft():
                work.wait()
        self._gradients.append([self._send(gradient, before.rank, before.backward) for gradient in gradients])
        if self.balance is not None:
            total = self.balance.now.total
            assert total is not None
            self._counts.append(self._send(total, before.rank, before.backward))
        if border.after_gradient is not None:
            border.after_gradient()

    def finish(self) -> None:
        """Wait until everything sent has left."""
        for work, _ in itertools.chain(*self._outputs.values(), *self._gradients, self._counts):
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

    def _send(self, tensor: Tensor, rank: int, group: dist.ProcessGroup) -> Sent:
        tensor = tensor.contiguous()
        work = dist.isend(tensor, dst=rank, group=group)
        assert work is not None
        return work, tensor


Forward = Callable[[int, int, Inbox | None], Outputs]


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
        forward: (microbatch, chunk, what was received or None) → the chunk's outputs.
        messages: this step's.
        before_backward: called with the microbatch, the chunk and whether it is its last backward of the step, before
            each.
        weight_pass: called with the chunk and whether it is its last weight pass of the step, for each.
    """
    alive: dict[tuple[int, int], Outputs] = {}
    losses: list[Tensor] = []
    left = Counter((action.kind, action.chunk) for action in actions)
    for kind, microbatch, chunk in actions:
        border = messages.borders[chunk]
        left[kind, chunk] -= 1
        if kind == "forward":
            inbox = None if border.is_first else messages.receive_hidden(chunk)
            outputs = forward(microbatch, chunk, inbox)
            if border.is_last:
                losses.append(outputs[0].detach())
            else:
                messages.send_hidden(microbatch, chunk, outputs)
            if left["backward", chunk]:
                alive[microbatch, chunk] = outputs
        elif kind == "weight":
            if border.trains_until:
                weight_pass(chunk, left[kind, chunk] == 0)
        else:
            outputs = alive.pop((microbatch, chunk))
            if not border.trains_until:  # nothing here or before has a gradient, and none comes
                messages.let_go_of_hidden(microbatch, chunk)
                continue
            before_backward(microbatch, chunk, left[kind, chunk] == 0)
            gradients = (None,) if border.is_last else messages.receive_gradients(microbatch, chunk, outputs)
            _backward(outputs, gradients)
            del outputs, gradients  # or they would live on through the next forward
    return losses


def _backward(outputs: Outputs, gradients: Sequence[Tensor | None]) -> None:
    """From the outputs that something trained has made."""
    made = [index for index, output in enumerate(outputs) if output.requires_grad]
    torch.autograd.backward([outputs[index] for index in made], [gradients[index] for index in made])
