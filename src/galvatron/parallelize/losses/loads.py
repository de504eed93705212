"""Router biases: what is added to an expert's score where experts are chosen, so that loads even out.

They have no gradient.  After a step each moves by a rate: up where fewer rows than the mean chose its expert, down
where more did (Wang et al. 2024; DeepSeek-V3, section 2.1.2).  Counts are whole numbers, summed over the step's
microbatches and the ranks of a stage: whatever the plan, every copy of a bias moves as that of one process does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from galvatron.internals import is_in_backward

from ..layers.forward import wrap_forward


@dataclass
class Loads:
    """How often the experts of this rank's layers were chosen in a step; ``stage``: the ranks of the stage, if more."""

    stage: dist.ProcessGroup | None
    _biases: list[Tensor] = field(default_factory=list)
    _counts: list[Tensor] = field(default_factory=list)

    def watch(self, router: nn.Module, bias_E: Tensor) -> None:
        """Let ``router``, which gives the experts of every row third, [T, k], count them for its ``bias_E``."""
        count_E = torch.zeros(len(bias_E), dtype=torch.int64, device=bias_E.device)
        self._biases.append(bias_E)
        self._counts.append(count_E)

        def note(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            found = forward(*args, **kwargs)
            if torch.is_grad_enabled() and not is_in_backward():  # a router that runs again counts nothing
                index = found[2].flatten()
                count_E.scatter_add_(0, index, torch.ones_like(index))
            return found

        wrap_forward(router, note)

    def begin(self) -> None:
        """A step begins."""
        for count in self._counts:
            count.zero_()

    @torch.no_grad()
    def move(self, rate: float) -> None:
        """Move every bias by ``rate`` towards an even load; collective over a stage's ranks."""
        if not self._biases:  # of a stage without experts
            return
        counts_LE = torch.stack(self._counts)
        if self.stage is not None:
            dist.all_reduce(counts_LE, group=self.stage)
        mean_L1 = counts_LE.double().mean(dim=1, keepdim=True)
        for bias, towards in zip(self._biases, (mean_L1 - counts_LE).sign(), strict=True):
            bias.add_(towards.to(bias.dtype) * rate)
