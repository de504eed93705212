"""ParallelModel: one rank's part of a model under a plan, with steps that give exact gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig

from galvatron.core.model import ModelSpec
from galvatron.internals import local_part
from galvatron.plan.schedules import Action, actions

from .batch import BatchCheck
from .export import MAX_SHARD_BYTES, write_hf_directory
from .fsdp import DTYPES, ShardedUnit, free_gathered, gathered_buffers, prepare_backward
from .gather import Shapes, gather_whole
from .gradients import clip, global_norm, sum_over
from .grid import Grid
from .pieces import LocalParameter
from .pipeline import Neighbours, run
from .safetensors_file import Entry
from .stage import Stage


@dataclass(frozen=True)
class Replicated:
    """Parameters whose partial gradients are summed over a group after the last backward."""

    group: dist.ProcessGroup
    parameters: tuple[LocalParameter, ...]


class ParallelModel:
    """A model under a plan: parameters are local shards, losses and norms are global.

    Attributes:
        plan, spec, grid, config: what it was made from.
        stage: this rank's stage as a module.
        local_parameters: every parameter this rank holds a part of.
    """

    def __init__(
        self,
        grid: Grid,
        spec: ModelSpec,
        config: PretrainedConfig,
        stage: Stage,
        units: tuple[ShardedUnit, ...],
        sharded: dict[str, nn.Parameter],
        parameters: list[LocalParameter],
        replicated: tuple[Replicated, ...],
    ) -> None:
        """Made by ``parallelize``; ``sharded`` maps names to the FSDP2 parameters behind ``parameters``."""
        self.plan, self.spec, self.grid, self.config = grid.plan, spec, grid, config
        self.stage, self.local_parameters = stage, parameters
        self._units, self._sharded, self._replicated = units, sharded, replicated
        shape, device = (self.plan.global_batch_size, self.plan.seq_len), grid.world.device
        self._train_batches = BatchCheck(shape, spec.vocab_size, device)
        self._evaluation_batches = BatchCheck(shape, spec.vocab_size, device)
        layers = self.plan.stage_layers(grid.stage)
        self._trains_before = not grid.is_first and spec.trains_before(layers.start)
        self._trains_until = grid.is_last or spec.trains_before(layers.stop)
        self._position_ids = torch.arange(self.plan.seq_len, device=grid.world.device).unsqueeze(0)

    def train_step(self, input_ids: Tensor, labels: Tensor) -> float:
        """Forward and backward of one global batch under the plan's schedule.

        Args:
            input_ids: int64 [global_batch_size, seq_len], equal on all ranks, on any device.
            labels: the same shape, already shifted; -100 does not count.

        Returns:
            The mean loss over all counted tokens, equal on all ranks.  Every ``LocalParameter.tensor.grad``
            is then this rank's part of that loss's gradient; earlier gradients are forgotten.

        Raises:
            DataError: a batch of another shape or dtype, with ids that the vocabulary lacks, or not equal on all
                ranks.  Nothing has changed then.
        """
        weight = self._train_batches.weight(input_ids, labels)
        self.zero_grad()
        plan, grid = self.plan, self.grid
        order = actions(plan.schedule, plan.pp, grid.stage, plan.num_microbatches)
        loss = self._run(order, input_ids, labels, weight)
        if not self._trains_until:
            free_gathered(self._units)  # which the end of a backward does elsewhere
        self._collect_gradients()
        return loss

    @torch.no_grad()
    def evaluate(self, input_ids: Tensor, labels: Tensor) -> float:
        """The mean loss of a batch of the plan's shape, without gradients or dropout; equal on all ranks."""
        weight = self._evaluation_batches.weight(input_ids, labels)
        self.stage.eval()
        order = [Action("forward", i) for i in range(self.plan.num_microbatches)]
        loss = self._run(order, input_ids, labels, weight)
        self.stage.train()
        free_gathered(self._units)
        return loss

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.local_parameters:
            parameter.tensor.grad = None
            self._sharded[parameter.name].grad = None

    def clip_grad_norm_(self, max_norm: float | None) -> float:
        """The global gradient norm, before scaling gradients down to ``max_norm`` if it is given."""
        norm = global_norm(self.local_parameters, self.grid.world.device)
        if max_norm is not None:
            clip(self.local_parameters, norm, max_norm)
        return float(norm)

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        tokenizer: Any = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Write weights in ``dtype``, config and, if given, a Hugging Face ``tokenizer`` for ``from_pretrained``.

        A collective call; rank 0 writes, one tensor at a time.  ``directory`` must be new or empty and appears
        whole or not at all.  Raises OutputError if it is not empty or the disk refuses.
        """

        def write(shapes: Shapes, tensors: Iterator[Tensor]) -> None:
            entries = [Entry(name, dtype, shape) for name, shape in shapes.items()]
            write_hf_directory(Path(directory), self.config, entries, tensors, tokenizer, max_shard_bytes)

        gather_whole(self.local_parameters, write)

    def gathered_buffers(self) -> Iterator[Tensor]:
        """The buffers for gathered parameters, of no bytes while not in use: for those who count memory."""
        return gathered_buffers(self._units)

    def _run(self, order: list[Action], input_ids: Tensor, labels: Tensor, weight: float) -> float:
        forward = self._forward(input_ids, labels, weight)
        losses = run(order, forward, self._neighbours(), self._before_backward)
        total = torch.zeros((), device=self.grid.world.device)
        for loss in losses:
            total += loss
        dist.all_reduce(total)
        return float(total)

    def _forward(self, input_ids: Tensor, labels: Tensor, weight: float) -> Callable[[int, Tensor | None], Tensor]:
        def forward(microbatch: int, received: Tensor | None) -> Tensor:
            tokens = received if received is not None else self._rows(input_ids, microbatch, self.plan.embedding.dp)
            own_labels = self._rows(labels, microbatch, self.plan.head.dp) if self.grid.is_last else None
            output: Tensor = self.stage(tokens, self._position_ids, own_labels, weight)
            return output

        return forward

    def _rows(self, batch: Tensor, microbatch: int, dp: int) -> Tensor:
        """This rank's rows of a microbatch, on its device."""
        rows = self.plan.micro_batch_size // dp
        start = microbatch * self.plan.micro_batch_size
        start += self.grid.axes.batch_chunk(self.grid.stage_rank, self.plan.stage_size // dp) * rows
        return batch[start : start + rows].to(self.grid.world.device)

    def _neighbours(self) -> Neighbours:
        plan, stage = self.plan, self.grid.stage
        previous = plan.embedding if stage == 0 else plan.layers[plan.stage_layers(stage).start - 1]
        shape = (plan.micro_batch_size // previous.dp, plan.seq_len // previous.sequence_degree, self.spec.hidden_size)
        return Neighbours(
            self.grid, shape, DTYPES[plan.precision], trains_before=self._trains_before, trains_until=self._trains_until
        )

    def _before_backward(self, is_last: bool) -> None:
        prepare_backward(self.stage, self._units, is_last=is_last)

    def _collect_gradients(self) -> None:
        """Point the local tensors at the gradients FSDP2 left, then sum what it does not know to be replicated."""
        for parameter in self.local_parameters:
            if not parameter.tensor.requires_grad:
                continue
            gradient = self._sharded[parameter.name].grad
            assert isinstance(gradient, DTensor), parameter.name
            parameter.tensor.grad = local_part(gradient)
        for replicated in self._replicated:
            sum_over(replicated.group, [p.tensor.grad for p in replicated.parameters if p.tensor.grad is not None])
