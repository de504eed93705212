"""What training asks of a parallel model, as protocols: ``galvatron.parallelize`` gives it, tests may fake it.

Knows nothing of how a model is cut beyond pieces: boxes of a local tensor and the boxes of the global
tensor they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from galvatron.core.model import ModelSpec
from galvatron.models import Adapter
from galvatron.parallelize import LocalParameter
from galvatron.parallelize.losses.scale import LossScale

if TYPE_CHECKING:
    from .metrics import Metric, StepMetrics


class TrainableModel(Protocol):
    """A model cut by a plan.  Batches are tensors by name, [global_batch_size, ...], equal on all ranks.

    Of a language model they are int64 ``input_ids`` and ``labels`` [global_batch_size, seq_len], and ``position_ids``
    where documents of a row are apart.

    Labels are shifted by one already; -100 is ignored.  ``train_step`` leaves the gradients of the global
    mean loss on the parameters, times ``loss_scale`` where there is one, which norms are without; losses and norms are
    scalars on the device, equal on all ranks.  ``steps`` calls of it are done, which decides what dropout draws.
    """

    steps: int
    loss_scale: LossScale | None

    @property
    def spec(self) -> ModelSpec: ...  # noqa: D102
    @property
    def config(self) -> Any: ...  # noqa: D102
    @property
    def adapter(self) -> Adapter | None: ...  # noqa: D102
    @property
    def local_parameters(self) -> Sequence[LocalParameter]: ...  # noqa: D102
    @property
    def capacity_factor(self) -> float | None: ...  # noqa: D102
    @property
    def train_step(self) -> Callable[..., torch.Tensor]: ...  # noqa: D102
    @property
    def evaluate(self) -> Callable[..., torch.Tensor]: ...  # noqa: D102
    @property
    def evaluate_classes(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]: ...  # noqa: D102
    def zero_grad(self) -> None: ...  # noqa: D102
    def move_router_biases(self, rate: float) -> None: ...  # noqa: D102
    def dropped_choices(self) -> torch.Tensor: ...  # noqa: D102
    def grad_norm(self) -> torch.Tensor: ...  # noqa: D102
    def gathered_buffers(self) -> Iterable[torch.Tensor]: ...  # noqa: D102


class Reporter:
    """What training tells whoever watches, on rank 0 only; this one stays silent."""

    def started(self, first_step: int, num_steps: int) -> None:
        """Steps ``first_step`` (1-based) to ``num_steps`` are about to run."""

    def noted(self, text: str) -> None:
        """Something about the run that its owner should know, in one sentence."""

    def stepped(self, metrics: StepMetrics) -> None:
        """A step is done."""

    def skipped(self, step: int, reason: str) -> None:
        """A step is done that nothing was learnt from."""

    def evaluated(self, step: int, loss: float, name: str, metric: Metric) -> None:
        """An evaluation after ``step`` is done: ``eval_loss``, of what is held out, or ``validation_loss``."""

    def saved(self, step: int, path: Path) -> None:
        """The checkpoint of ``step`` is complete at ``path``."""
