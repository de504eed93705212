"""The auxiliary loss of routers: how unevenly tokens are spread over experts (Fedus et al. 2022, eq. 4).

For a microbatch: E x the sum over experts of (how often it was chosen) x (the sum of its probabilities) / N², over all
N rows that its layers route together.  A product of sums over layers and ranks is no sum of theirs.  So the counts,
which have no gradient, go through the pipeline with hidden states, are summed over the last stage's ranks and go back
with gradients, for a router's gradient needs all of them.  The value is made of what all ranks have at a step's end.

A step's auxiliary loss is the mean over its microbatches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layers.forward import wrap_forward


@dataclass
class Spread:
    """How one microbatch's rows are spread over E experts: float32 [E] each.

    Attributes:
        carried: how often each was chosen, in this column of the pipeline, so far.
        chosen, probable: the same of this rank alone, and sums of probabilities.
        total: how often each was chosen in all; known before the first backward.
    """

    carried: Tensor
    chosen: Tensor
    probable: Tensor
    total: Tensor | None = None


@dataclass
class Balance:
    """What this rank's routers note of a step.

    Attributes:
        coefficient: of the loss, divided by the step's number of microbatches.
        num_experts, rows: E and N.
        top_k: experts that a row chooses.
        stage: the ranks of this stage; None where there is one.
    """

    coefficient: float
    num_experts: int
    rows: int
    top_k: int
    device: torch.device
    stage: dist.ProcessGroup | None
    scale: float = 1.0
    _spreads: dict[int, Spread] = field(default_factory=dict)
    _now: Spread | None = None
    _notes: bool = False

    def begin(self, scale: float) -> None:
        """A step begins, whose losses are multiplied by ``scale``."""
        self._spreads.clear()
        self.scale = scale

    def forward(self, microbatch: int) -> Spread:
        """The forward pass of ``microbatch`` through a chunk begins: routers note."""
        if microbatch not in self._spreads:
            self._spreads[microbatch] = Spread(*(torch.zeros(self.num_experts, device=self.device) for _ in range(3)))
        self._now, self._notes = self._spreads[microbatch], True
        return self._now

    def backward(self, microbatch: int) -> Spread:
        """Its backward begins: routers that run again note nothing."""
        self._now, self._notes = self._spreads[microbatch], False
        return self._now

    @property
    def now(self) -> Spread:
        """Of the microbatch that is passing."""
        assert self._now is not None
        return self._now

    def close(self, spread: Spread) -> None:
        """All chunks have noted a microbatch: sum over this stage's ranks."""
        spread.total = spread.carried.clone()
        if self.stage is not None:
            dist.all_reduce(spread.total, group=self.stage)

    def loss(self) -> Tensor:
        """The auxiliary loss of the microbatches noted, times the scale; collective over the world."""
        sums = torch.stack([torch.stack((s.chosen, s.probable)) for _, s in sorted(self._spreads.items())])
        dist.all_reduce(sums)
        return self._factor * (sums[:, 0] * sums[:, 1]).sum()

    @property
    def _factor(self) -> float:
        return self.scale * self.coefficient * self.num_experts / self.rows**2

    def watch(self, router: nn.Module) -> None:
        """Let ``router``, which gives logits [T, E] and weights [T, k] first, note its rows and get their gradient."""
        wrap_forward(router, self._note)

    def _note(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        logits_TE, weights_Tk, *others = forward(*args, **kwargs)
        spread = self.now
        if self._notes:
            probabilities_TE = logits_TE.detach().float().softmax(dim=-1)
            chosen = torch.zeros_like(spread.chosen)
            index = probabilities_TE.topk(self.top_k, dim=-1).indices.flatten()
            chosen.scatter_add_(0, index, torch.ones_like(index, dtype=chosen.dtype))
            spread.chosen += chosen
            spread.carried += chosen
            spread.probable += probabilities_TE.sum(dim=0)
        return logits_TE, _Balanced.apply(weights_Tk, logits_TE, spread, self._factor), *others


class _Balanced(torch.autograd.Function):
    # the weights are what the layer uses; the logits' gradient of this loss goes beside theirs
    @staticmethod
    def forward(ctx: Any, weights: Tensor, logits: Tensor, spread: Spread, factor: float) -> Tensor:
        ctx.spread, ctx.factor = spread, factor
        ctx.save_for_backward(logits)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (logits_TE,) = ctx.saved_tensors
        assert ctx.spread.total is not None
        probabilities_TE = logits_TE.float().softmax(dim=-1)
        pull_E = ctx.factor * ctx.spread.total
        of_logits = probabilities_TE * (pull_E - (probabilities_TE @ pull_E).unsqueeze(-1))
        return grad, of_logits.to(logits_TE.dtype), None, None
