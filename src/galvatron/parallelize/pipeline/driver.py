"""One batch through this rank's stage: which rows it takes, whom it hears from, and the loss of the whole world.

Takes a stage whose modules are cut already and batches that are checked already; leaves gradients where its units
put them.  Knows nothing of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron.core.model import ModelSpec
from galvatron.plan.schedules import Action, actions

from ..losses.fused import PLAIN, LossTerms
from ..losses.own import LossFunction
from ..processes.grid import Grid
from ..sharding.fsdp import DTYPES, ShardedUnit, free_gathered, gather_for_step, prepare_backward, reduce_held
from ..sharding.unsharded import UnshardedUnit
from .passes import Inbox, Neighbours, run
from .stage import Stage


@dataclass(frozen=True)
class Batch:
    """A global batch, int64 [global_batch_size, seq_len] twice, and what makes a loss of it.

    Attributes:
        weight: what a token's loss counts for.
        loss_fn: in place of cross entropy.
        terms: of cross entropy.
    """

    input_ids: Tensor
    labels: Tensor
    weight: float
    loss_fn: LossFunction | None = None
    terms: LossTerms = PLAIN


class Driver:
    """Runs batches through one stage of a plan; every method is collective and gives the loss of all ranks."""

    def __init__(
        self,
        grid: Grid,
        spec: ModelSpec,
        stage: Stage,
        sharded: tuple[ShardedUnit, ...],
        unsharded: tuple[UnshardedUnit, ...],
    ) -> None:
        self.grid, self.plan, self.stage = grid, grid.plan, stage
        self.sharded, self.unsharded = sharded, unsharded
        self.hidden_size = spec.hidden_size
        layers = self.plan.stage_layers(grid.stage)
        self.trains_before = not grid.is_first and spec.trains_before(layers.start)
        self.trains_until = grid.is_last or spec.trains_before(layers.stop)
        enters_unsharded = self.trains_before and not self.plan.layers[layers.start].zero
        self._entry = unsharded[0] if enters_unsharded else None  # holds the layer that sends gradients back
        self.position_ids = torch.arange(self.plan.seq_len, device=grid.world.device).unsqueeze(0)

    def train(self, batch: Batch) -> Tensor:
        """Forward and backward under the plan's schedule."""
        plan = self.plan
        loss = self._run(actions(plan.schedule, plan.pp, self.grid.stage, plan.num_microbatches), batch)
        if not self.trains_until:
            free_gathered(self.sharded)  # which the end of a backward does elsewhere
        self._finish_gradients()
        return loss

    def evaluate(self, batch: Batch) -> Tensor:
        """Forward alone."""
        loss = self._run([Action("forward", index) for index in range(self.plan.num_microbatches)], batch)
        free_gathered(self.sharded)
        return loss

    def rehearse(self, microbatch: Batch, *, backward: bool) -> None:
        """Forward of a single microbatch, and its backward or not."""
        self._run([Action("forward", 0), *([Action("backward", 0)] if backward else [])], microbatch)
        free_gathered(self.sharded)
        if backward:
            self._finish_gradients()

    def _finish_gradients(self) -> None:
        for unit in self.unsharded:
            unit.finish()

    def _run(self, order: list[Action], batch: Batch) -> Tensor:
        self.stage.early_gradient.forget()
        for unit in self.unsharded:
            unit.refresh()
        if not self.grid.is_first:
            gather_for_step(self.sharded)

        embedding_dp, head_dp = self.plan.embedding.dp, self.plan.head.dp
        ids = self._own_rows(batch.input_ids, embedding_dp) if self.grid.is_first else None
        labels = self._own_rows(batch.labels, head_dp) if self.grid.is_last else None

        def forward(microbatch: int, received: Inbox | None) -> Tensor:
            tokens = received if ids is None else ids[microbatch]
            assert tokens is not None
            own_labels = None if labels is None else labels[microbatch]
            output: Tensor = self.stage(tokens, self.position_ids, own_labels, batch.weight, batch.loss_fn, batch.terms)
            return output

        neighbours = self._neighbours()
        losses = run(order, forward, neighbours, self._before_backward)
        if self.trains_before and order[-1].kind == "backward":
            reduce_held(self.stage, self.sharded)
        neighbours.finish()
        total = torch.zeros((), device=self.grid.world.device)
        for loss in losses:
            total += loss
        dist.all_reduce(total)
        return total

    def _before_backward(self, is_last: bool) -> None:
        prepare_backward(self.stage, self.sharded, is_last=is_last, sends_back=self.trains_before)
        for unit in self.unsharded:
            unit.before_backward(is_last=is_last, sends_back=unit is self._entry)

    def _own_rows(self, values: Tensor, dp: int) -> Tensor:
        """This rank's rows [num_microbatches, micro_batch_size / dp, seq_len] of a batch, on its device.

        All of a step at once, from pinned memory: a copy from other memory makes the host wait for the device.
        """
        chunk, device = (
            self.grid.axes.batch_chunk(self.grid.stage_rank, self.plan.stage_size // dp),
            self.grid.world.device,
        )
        own = values.unflatten(0, (-1, dp, self.plan.micro_batch_size // dp))[:, chunk]
        if device.type == "cuda" and not own.is_cuda:
            own = own.contiguous().pin_memory()
        return own.to(device, non_blocking=True)

    def _neighbours(self) -> Neighbours:
        plan, stage = self.plan, self.grid.stage
        previous = plan.embedding if stage == 0 else plan.layers[plan.stage_layers(stage).start - 1]
        shape = (plan.micro_batch_size // previous.dp, plan.seq_len // previous.sequence_degree, self.hidden_size)
        return Neighbours(
            self.grid,
            shape,
            DTYPES[plan.precision],
            trains_before=self.trains_before,
            trains_until=self.trains_until,
            after_gradient=self._entry.count_arrival if self._entry is not None else None,
        )
