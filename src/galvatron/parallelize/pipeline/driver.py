"""One batch through this rank's stage: which rows it takes, whom it hears from, and the loss of the whole world.

Takes a stage whose modules are cut already and batches that are checked already; leaves gradients where its units
put them.  Knows nothing of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron.core.model import ModelSpec
from galvatron.plan import LayerStrategy, Plan
from galvatron.plan.filling import filling_of
from galvatron.plan.schedules import Action, actions, forwards

from ..layers.documents import PackedSteps
from ..losses.balance import Balance
from ..losses.fused import PLAIN, LossTerms
from ..losses.own import LossFunction
from ..processes.collectives import of_spans
from ..processes.grid import Grid
from ..sharding.fsdp import DTYPES, ShardedUnit, free_gathered, gather_for_step, prepare_backward, reduce_held
from ..sharding.unsharded import UnshardedUnit
from .images import ImageSteps, without_images
from .passes import Border, Inbox, Messages, Outputs, run
from .stage import Stage
from .whole import SIDE, WholeStage


@dataclass(frozen=True)
class Batch:
    """A global batch, and what makes a loss of it.

    Attributes:
        inputs: what the model takes, by name, [global_batch_size, ...] each but for what is of images with grids; ids
            are int64 [..., seq_len].
        labels: int64 [global_batch_size, seq_len], or [global_batch_size] where samples have classes.
        weight: what a token's loss counts for.
        loss_fn: in place of cross entropy.
        terms: of cross entropy.
        position_ids: of the same shape, where rows are packed documents, or padded; each begins with 0.
        scale: what all losses are multiplied by.
        scores: where samples have classes, whether the loss comes with the share that is told right: [2].
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    weight: float
    loss_fn: LossFunction | None = None
    terms: LossTerms = PLAIN
    position_ids: Tensor | None = None
    scale: float = 1.0
    scores: bool = False


@dataclass(frozen=True)
class Chunk:
    """A model chunk of this rank, cut and sharded: its modules, and the units in which its parameters live.

    ``later``: those of the ``sharded`` that are not reduced before a weight pass.
    """

    stage: Stage
    sharded: tuple[ShardedUnit, ...]
    unsharded: tuple[UnshardedUnit, ...]
    later: tuple[ShardedUnit, ...] = ()


class Driver:
    """Runs batches through one stage of a plan; every method is collective and gives the loss of all ranks."""

    def __init__(self, grid: Grid, spec: ModelSpec, chunks: tuple[Chunk, ...], balance: Balance | None = None) -> None:
        """``chunks``: of this rank, in forward order; ``balance``: what their routers note."""
        self._balance = balance
        self.grid, self.plan, self.chunks = grid, grid.plan, chunks
        self._sees_whole = isinstance(chunks[0].stage, WholeStage)
        self._entries = tuple(_entry(chunk, grid.plan, spec) for chunk in chunks)
        self.borders = tuple(
            _border(chunk.stage, entry, grid.plan, spec) for chunk, entry in zip(chunks, self._entries, strict=True)
        )
        # what waits for the end of a step is reduced after its messages, and after its weight passes
        self._reduces_last = tuple(
            border.trains_before or (chunk.stage.later is not None and border.trains_until)
            for chunk, border in zip(chunks, self.borders, strict=True)
        )
        whole = torch.arange(self.plan.seq_len, device=grid.world.device).unsqueeze(0)
        self._position_ids = tuple(of_spans(whole, chunk.stage.position_spans) for chunk in chunks)

    def train(self, batch: Batch) -> Tensor:
        """Forward and backward under the plan's schedule."""
        plan = self.plan
        loss = self._run(
            actions(plan.schedule, plan.pp, self.grid.stage, plan.num_microbatches, plan.model_chunks), batch
        )
        for chunk, border in zip(self.chunks, self.borders, strict=True):
            if not border.trains_until:
                free_gathered(chunk.sharded)  # which the end of a backward does elsewhere
        self._finish_gradients()
        return loss

    def evaluate(self, batch: Batch) -> Tensor:
        """Forward alone."""
        plan = self.plan
        loss = self._run(forwards(plan.schedule, plan.pp, plan.num_microbatches, plan.model_chunks), batch)
        self._free_gathered()
        return loss

    def rehearse(self, microbatch: Batch, *, backward: bool) -> None:
        """Forward of a single microbatch, and its backward or not."""
        order = [Action("forward", 0, chunk) for chunk in range(len(self.chunks))]
        if backward:
            order += [Action("backward", 0, action.chunk) for action in reversed(order)]
        if backward and self.plan.schedule == "zero_bubble":
            order += [Action("weight", 0, chunk) for chunk in reversed(range(len(self.chunks)))]
        self._run(order, microbatch)
        self._free_gathered()
        if backward:
            self._finish_gradients()

    def _free_gathered(self) -> None:
        for chunk in self.chunks:
            free_gathered(chunk.sharded)

    def _finish_gradients(self) -> None:
        for chunk in self.chunks:
            for unit in chunk.unsharded:
                unit.finish()

    def _run(self, order: list[Action], batch: Batch) -> Tensor:
        for chunk in self.chunks:
            chunk.stage.early_gradient.forget()
            for unit in chunk.unsharded:
                unit.refresh()
            if chunk.stage.later is not None:
                chunk.stage.later.forget()
            if not chunk.stage.is_first:
                gather_for_step(chunk.sharded)

        if self._balance is not None:
            self._balance.begin(batch.scale)
        counting = self._balance if torch.is_grad_enabled() else None
        messages = Messages(self.grid, self.borders, DTYPES[self.plan.precision], counting)
        images = self._images(batch.inputs)
        inputs = self._own_inputs(batch.inputs if images is None else without_images(batch.inputs))
        labels = self._own(batch.labels, self.plan.head) if self.borders[-1].is_last else None
        packed = [self._packed(batch.position_ids, chunk.stage) for chunk in self.chunks]

        def forward(microbatch: int, chunk: int, received: Inbox | None) -> Outputs:
            stage, positions, steps = self.chunks[chunk].stage, self._position_ids[chunk], packed[chunk]
            stage.packed.now = None if steps is None else steps.documents[microbatch]
            positions = positions if steps is None else steps.positions[microbatch]
            own_labels = labels[microbatch] if labels is not None and stage.is_last else None
            own_inputs = {name: values[microbatch] for name, values in inputs.items()}
            if images is not None:
                own_inputs |= images.given(microbatch, stage.position_rows)
            loss = (own_labels, batch.weight, batch.loss_fn, batch.terms)
            spread = None if self._balance is None else self._balance.forward(microbatch)
            if spread is not None and messages.arrived is not None:
                spread.carried, messages.arrived = messages.arrived, None
            if isinstance(stage, WholeStage):
                output: Tensor | Outputs = stage(received, own_inputs, *loss, scores=batch.scores)
            else:
                output = stage(received or own_inputs["input_ids"], positions, *loss)
            if counting is not None and spread is not None and stage.is_last:
                counting.close(spread)
            return output if isinstance(output, tuple) else (output,)

        losses = run(order, forward, messages, self._before_backward, self._weight_pass)
        if order[-1].kind != "forward":
            for chunk, reduces_last in zip(self.chunks, self._reduces_last, strict=True):
                if reduces_last:
                    reduce_held(chunk.stage, chunk.sharded)
        messages.finish()
        total = torch.zeros((2,) if batch.scores else (), device=self.grid.world.device)
        for loss in losses:
            total += loss
        dist.all_reduce(total)
        return total if self._balance is None else total + self._balance.loss()

    def _before_backward(self, microbatch: int, index: int, is_last: bool) -> None:
        if self._balance is not None:
            self._balance.backward(microbatch)
        chunk, later = self.chunks[index], self.chunks[index].stage.later
        prepare_backward(
            chunk.stage, chunk.sharded, is_last=is_last, reduces_last=self._reduces_last[index], later=chunk.later
        )
        for unit in chunk.unsharded:
            unit.before_backward(is_last=is_last, sends_back=unit is self._entries[index])
        if later is not None:
            later.begin()

    def _weight_pass(self, index: int, is_last: bool) -> None:
        later = self.chunks[index].stage.later
        assert later is not None
        later.multiply(is_last=is_last)

    def _packed(self, position_ids: Tensor | None, stage: Stage) -> PackedSteps | None:
        if position_ids is None:
            return None
        each = position_ids.cpu().unflatten(0, (-1, self.plan.micro_batch_size))
        return PackedSteps.of(
            each, stage.position_rows, stage.position_spans, stage.document_rows, self.grid.world.device
        )

    def _images(self, inputs: Mapping[str, Tensor]) -> ImageSteps | None:
        stage, plan = self.chunks[0].stage, self.plan
        if stage.family.tower is None:
            return None
        rows, sees = self.grid.rows(plan.embedding), stage.is_first
        return ImageSteps.of(stage.model, inputs, plan.micro_batch_size, rows, self.grid.world.device, sees=sees)

    def _own_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's, as ``_own`` gives them: what its first chunk needs, or of ends that see whole sequences all.

        Where nothing looks at them, images are zeros in no memory.
        """
        if any(chunk.stage.entry_modules for chunk in self.chunks):
            return {name: self._own(values, self.plan.embedding) for name, values in inputs.items()}
        if not self._sees_whole:
            return {}
        return {
            name: self._own(
                values.new_zeros((), device=self.grid.world.device).expand(values.shape)
                if values.is_floating_point()
                else values,
                self.plan.embedding,
            )
            for name, values in inputs.items()
        }

    def _own(self, values: Tensor, strategy: LayerStrategy) -> Tensor:
        """This rank's part [num_microbatches, micro_batch_size / dp, ...] of a batch, on its device; of sequences also
        seq_len / ulysses, unless the ends see them whole.

        All of a step at once, from pinned memory: a copy from other memory makes the host wait for the device.
        """
        chunk = self.grid.axes.batch_chunk(self.grid.stage_rank, strategy.sequence_degree)
        own = values.unflatten(0, (-1, strategy.dp, self.plan.micro_batch_size // strategy.dp))[:, chunk]
        own, device = own if self._sees_whole else of_spans(own, self.grid.spans(strategy)), self.grid.world.device
        if device.type == "cuda" and not own.is_cuda:
            own = own.contiguous().pin_memory()
        return own.to(device, non_blocking=True)


def _entry(chunk: Chunk, plan: Plan, spec: ModelSpec) -> UnshardedUnit | None:
    """The unit of the layer that sends gradients back, if they are summed beside the backward."""
    first = chunk.stage.layers.start
    sends_back = not chunk.stage.is_first and spec.trains_before(first)
    return chunk.unsharded[0] if sends_back and not plan.layers[first].zero else None


def _border(stage: Stage, entry: UnshardedUnit | None, plan: Plan, spec: ModelSpec) -> Border:
    return Border(
        in_shapes=() if stage.is_first else tuple(_in_shapes(stage, plan, spec)),
        is_first=stage.is_first,
        is_last=stage.is_last,
        trains_before=not stage.is_first and spec.trains_before(stage.layers.start),
        trains_until=stage.is_last or spec.trains_before(stage.layers.stop),
        after_gradient=entry.count_arrival if entry is not None else None,
    )


def _in_shapes(stage: Stage, plan: Plan, spec: ModelSpec) -> Iterator[tuple[int, ...]]:
    """Of this rank's hidden states of a microbatch as they come in, and of what comes with them."""
    start, kinds = stage.layers.start, spec.kind_of_layers()
    kind, ends = kinds[start], plan.embedding
    previous = ends if isinstance(stage, WholeStage) and stage.chain[start].is_first else plan.layers[start - 1]
    filling, degree = filling_of(plan, spec, kind), previous.sequence_degree
    tokens = kind.tokens(plan.seq_len) // degree if filling is None else filling.local(degree)
    yield plan.micro_batch_size // previous.dp, tokens, kind.hidden_size
    rows = plan.micro_batch_size // ends.dp
    for name in stage.riding(start) if isinstance(stage, WholeStage) else ():
        if name != SIDE:
            yield rows, kind.carried
            continue
        side = kinds[next(stack.start for stack in spec.stack_ranges if start in stack) - 1]
        yield rows, side.tokens(plan.seq_len) // ends.sequence_degree, side.hidden_size
