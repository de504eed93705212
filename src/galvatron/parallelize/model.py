"""ParallelModel: one rank's part of a model under a plan, with steps that give exact gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig

from galvatron.core.errors import ConfigError, DataError, UnsupportedError
from galvatron.core.lora import is_adapters
from galvatron.core.model import ModelSpec
from galvatron.core.tasks import TOKEN_TASKS
from galvatron.internals import local_part, multiply_all_
from galvatron.models import Adapter, blank_inputs
from galvatron.models.inputs import words_of

from .checks.batch import BatchCheck
from .checks.packing import check_packing, check_padding
from .checks.refusals import INSTEAD_OF_COPYING, INSTEAD_OF_FORWARD, refusal
from .checks.surroundings import check_surroundings
from .layers.documents import positions_beside_padding
from .layers.randomness import masks_of
from .losses.balance import Balance
from .losses.fused import PLAIN, LossTerms
from .losses.own import LossFunction, check_loss, terms_of
from .losses.scale import LossScale
from .pipeline.driver import Batch, Chunk, Driver
from .pipeline.whole import WholeStage
from .processes.grid import Grid
from .sharding.fsdp import gathered_buffers
from .sharding.gradients import clip, global_norm, sum_over
from .state.adapters import check_alone, merge, merged_shapes, write_adapter
from .state.export import MAX_SHARD_BYTES, write_hf_directory
from .state.gather import Shapes, gather_whole
from .state.pieces import LocalParameter
from .state.safetensors_file import Entry
from .state.state import load_local_state, load_whole_state, local_state, whole_state


@dataclass(frozen=True)
class Replicated:
    """Parameters whose partial gradients are summed over a group after the last backward."""

    group: dist.ProcessGroup
    parameters: tuple[LocalParameter, ...]


def _with_positions(inputs: dict[str, Tensor], position_ids: Tensor | None) -> dict[str, Tensor]:
    return inputs if position_ids is None else {**inputs, "position_ids": position_ids}


class ParallelModel:
    """A model under a plan: parameters are local shards, losses and norms are global.

    It has what a module has where that means something for one process of many; the rest is refused by name.

    Attributes:
        plan, spec, grid, config: what it was made from; ``adapter``: of peft, if it has one.
        stages: this rank's part as modules, one a model chunk, in forward order.
        local_parameters: every parameter this rank holds a part of.
        seed, steps: dropout's masks come from the seed, the number of calls of ``train_step`` so far, and the rank.
            Whoever goes on with a run of his own sets ``steps`` to what it was.
        loss_scale: under fp16, what the loss of the next step is multiplied by: part of such a run too.
    """

    def __init__(
        self,
        grid: Grid,
        spec: ModelSpec,
        config: PretrainedConfig,
        chunks: tuple[Chunk, ...],
        shards: dict[str, nn.Parameter],
        parameters: list[LocalParameter],
        replicated: tuple[Replicated, ...],
        seed: int,
        adapter: Adapter | None = None,
        *,
        compiled: bool = False,
        balance: Balance | None = None,
    ) -> None:
        """Made by ``parallelize``; ``shards`` maps names to the FSDP2 parameters behind some of ``parameters``."""
        self.plan, self.spec, self.grid, self.config = grid.plan, spec, grid, config
        self.stages, self.local_parameters = tuple(chunk.stage for chunk in chunks), parameters
        self._shards, self._replicated = shards, replicated
        self._sharded = tuple(unit for chunk in chunks for unit in chunk.sharded)
        self._unsharded = tuple(unit for chunk in chunks for unit in chunk.unsharded)
        self._local = {p.name: p for p in parameters}
        self._placed = {p.name: (p.tensor.data_ptr(), p.tensor.requires_grad) for p in parameters}
        self.seed, self.steps, self.compiled, self.adapter = seed, 0, compiled, adapter
        self.loss_scale = LossScale() if self.plan.precision == "fp16" else None
        self._carried = 1.0  # what the gradients that there are were multiplied by
        self._checked_loss: LossFunction | None = None
        shape = (self.plan.global_batch_size, self.plan.seq_len)
        classes = None if spec.task in TOKEN_TASKS else spec.vocab_size
        words = spec.vocab_size if classes is None else words_of(config)
        self._train_batches = BatchCheck(shape, words, num_classes=classes)
        self._evaluation_batches = BatchCheck(shape, words, num_classes=classes)
        self._rounded = {p.name for p in parameters if any(unit.rounds(p.tensor) for unit in self._unsharded)}
        self._driver = Driver(grid, spec, chunks, balance)

    def train_step(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        loss_fn: LossFunction | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        accumulate: bool = False,
        num_tokens: int | None = None,
        **others: Tensor,
    ) -> Tensor:
        """Forward and backward of one global batch under the plan's schedule.  Collective over the world.

        Args:
            input_ids: int64 [global_batch_size, seq_len], the whole batch and equal on all ranks, on any device.
            labels: the same shape, of a causal language model already shifted; -100 does not count.  Where samples
                have a class each, int64 [global_batch_size].
            position_ids: the same shape, where rows are packed documents: from 0 on in each of them.  A token then sees
                its own document alone.
            loss_fn: a loss of your own in place of cross entropy: (float32 logits [tokens, vocabulary], int64 labels
                [tokens]) → losses [tokens], called with the counted tokens of this rank.  Each may depend on its own
                token alone, so that it is exact however the plan cuts vocabulary, sequence and batch; it is tried on
                two tokens of zeros first.  Whole logits of a microbatch then exist, on the last stage.
            label_smoothing: the share of a token's target that is spread over the whole vocabulary, as torch's.
            z_loss: what a token's log-sum-exp squared counts for beside its cross entropy (PaLM, section 5: 1e-4).
            accumulate: add to the gradients there are, at the cost of one more copy, while it runs, of this rank's
                shards of them, and of those that replicas sum in bf16: float32 sums of several calls are not rounded.
            num_tokens: what the summed token losses are divided by; by default how many labels count here.  Where
                several calls add up, give all of them the number of all of them: losses and gradients then add up
                to those of the mean over all their tokens.
            others: what else the model's forward takes, by name: ``pixel_values``, ``token_type_ids``; the batch is
                dim 0.  ``attention_mask``, int64 or bool [global_batch_size, seq_len], is 1 for a row's tokens and then
                0 for its padding, which no token sees.

        Returns:
            The mean loss over all counted tokens (and the routers' auxiliary loss, where the model's config has
            ``output_router_logits``), equal on all ranks: a float32 scalar on the device, which the host
            waits for only when it reads it (``float(loss)``).  The ``grad`` of every one of ``parameters()`` is then
            this rank's part of that loss's gradient; under fp16 times ``loss_scale.scale``, until ``clip_grad_norm_``
            takes that out.  The memory of gradients is used again: the next call overwrites
            what ``grad`` is now, so ``clone`` what shall outlive it.

        Raises:
            DataError: a batch of another shape or dtype, with ids that the vocabulary lacks, or not equal on all
                ranks.  Nothing has changed then.
            ConfigError: ``loss_fn`` does not return a loss a token or trains parameters of its own, terms of cross
                entropy are out of range or beside a ``loss_fn``, a parameter was replaced, the last step's gradients
                still carry the loss scale, or autocast, ``no_grad`` or another default dtype is in effect.
        """
        self._check_step(loss_fn, position_ids, others, gradients=True)
        self._check_carried(accumulate)
        terms = terms_of(loss_fn, label_smoothing, z_loss)
        self._check_contrast(plain=loss_fn is None and not label_smoothing and not z_loss)
        inputs, labels = self._given(input_ids, labels, others)
        weight = self._train_batches.weight(
            _with_positions(inputs, position_ids), labels, num_tokens=num_tokens, accumulate=accumulate
        )
        earlier = self._begin(accumulate)
        with masks_of(self.seed, self.steps, self.grid.world.rank, self.device):
            for stage in self.stages:
                if isinstance(stage, WholeStage):
                    stage.masks.begin(self.seed, self.steps, self.grid.world.rank, self.device)
            batch = self._batch(inputs, labels, self._carried * weight, position_ids, loss_fn, terms)
            scaled = self._driver.train(replace(batch, scale=self._carried))
        self._collect_gradients()
        self._add_gradients(earlier)
        self.steps += 1
        return scaled / self._carried

    def warm_up(self, *, packed: bool = False) -> float:
        """Compile what steps and evaluations will run, where layers are ``compiled``; the seconds it took.

        ``packed``: batches come with ``position_ids``, or an ``attention_mask``.

        Collective over the world: one microbatch of zeros goes forward and back, and one forward without gradients.
        Nothing of them stays.
        """
        start = time.perf_counter()
        if not self.compiled:
            return 0.0
        rows, seq_len, task = self.plan.micro_batch_size, self.plan.seq_len, self.spec.task
        shape = (rows, seq_len) if task in TOKEN_TASKS else (rows,)
        labels = torch.zeros(shape, dtype=torch.int64, device=self.device)
        inputs = blank_inputs(self.config, task, rows, seq_len, self.device)
        positions = None
        if packed and self.spec.ends == "whole":
            inputs["attention_mask"] = torch.ones((rows, seq_len), dtype=torch.int64, device=self.device)
        elif packed:
            positions = torch.arange(seq_len).expand(rows, seq_len)
        zeros, training = self._batch(inputs, labels, 1.0, positions), self.training
        with masks_of(self.seed, 0, self.grid.world.rank, self.device):
            self._driver.rehearse(zeros, backward=True)
        self.zero_grad()
        with torch.no_grad():
            self.eval()
            self._driver.rehearse(zeros, backward=False)
        self.train(training)
        return time.perf_counter() - start

    def evaluate(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        loss_fn: LossFunction | None = None,
        **others: Tensor,
    ) -> Tensor:
        """The mean loss of a batch of the plan's shape, without gradients or dropout: a scalar equal on all ranks.

        Collective over the world; raises as ``train_step`` does.
        """
        return self._evaluate(input_ids, labels, position_ids, loss_fn, others)

    def evaluate_classes(self, labels: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """As ``evaluate``, where samples have classes: the mean loss, and which share of them has the largest logit at
        its own class.
        """
        if self.spec.task in TOKEN_TASKS:
            raise ConfigError(f"{self.spec.name} is trained for {self.spec.task}, which has no classes; call evaluate")
        loss, share = self._evaluate(None, labels, None, None, inputs, scores=True)
        return loss, share

    @torch.no_grad()
    def _evaluate(
        self,
        input_ids: Tensor | None,
        labels: Tensor | None,
        position_ids: Tensor | None,
        loss_fn: LossFunction | None,
        others: Mapping[str, Tensor],
        *,
        scores: bool = False,
    ) -> Tensor:
        self._check_step(loss_fn, position_ids, others, gradients=False)
        self._check_contrast(plain=loss_fn is None)
        inputs, labels = self._given(input_ids, labels, others)
        weight = self._evaluation_batches.weight(_with_positions(inputs, position_ids), labels)
        training = self.training
        self.eval()
        batch = replace(self._batch(inputs, labels, weight, position_ids, loss_fn), scores=scores)
        loss = self._driver.evaluate(batch)
        self.train(training)
        return loss

    @property
    def training(self) -> bool:
        """Whether ``train_step`` draws dropout."""
        return self.stages[0].training

    def train(self, mode: bool = True) -> Self:
        """Let ``train_step`` draw dropout, or not."""
        for stage in self.stages:
            stage.train(mode)
        return self

    def eval(self) -> Self:
        """Let ``train_step`` draw no dropout; ``evaluate`` never does."""
        return self.train(False)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.grid.world.device

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's part of every parameter it has one of, by Hugging Face name; a part may be of no elements.

        Any optimizer of ``torch.optim`` takes them.  One that treats elements alone (SGD, Adam, Lion) computes what
        it would on whole tensors; one that looks at whole matrices (Muon, Adafactor, LAMB) sees this rank's part.
        """
        return ((part.name, part.tensor) for part in self.local_parameters)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The same without names.  Norms of their gradients are local: clip with ``clip_grad_norm_`` of the model."""
        return (part.tensor for part in self.local_parameters)

    def zero_grad(self) -> None:
        """Forget all gradients; ``train_step`` does so itself unless it accumulates."""
        for parameter in self.local_parameters:
            parameter.tensor.grad = None
        for shard in self._shards.values():
            shard.grad = None
        self._carried = 1.0

    def grad_norm(self) -> Tensor:
        """The global norm of the gradients, without the loss scale that they may carry: a float32 scalar."""
        return global_norm(self.local_parameters, self.device) / self._carried

    def clip_grad_norm_(self, max_norm: float | None) -> Tensor:
        """The global gradient norm, before scaling gradients down to ``max_norm`` if it is given; a float32 scalar.

        Under fp16, between ``train_step`` and every update: takes the loss scale out of the gradients, and moves it for
        the next step.  Where they overflowed (the norm is then inf or nan, on all ranks) there are none afterwards, so
        that an optimizer's step changes nothing.
        """
        norm = self.grad_norm()
        if max_norm is not None or self._carried != 1.0:
            clip(self.local_parameters, norm, max_norm, self._carried)
        self._carried = 1.0
        if self.loss_scale is not None:
            finite = math.isfinite(norm)
            self.loss_scale = self.loss_scale.after(finite=finite)
            if not finite:
                self.zero_grad()
        return norm

    def state_dict(self, *, full: bool = True) -> dict[str, Tensor]:
        """The weights.

        Args:
            full: whole tensors by Hugging Face name, float32 on the CPU, on rank 0; {} on the others.  Collective.
                ``hf_model.load_state_dict`` takes them.  Otherwise this rank's parts by name and place, as they
                are (``clone`` what shall not change): no communication, and of use to the same rank and plan alone.
        """
        return whole_state(self.local_parameters, self._ties) if full else local_state(self.local_parameters)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor], *, full: bool = True) -> None:
        """Take weights as ``state_dict`` gives them; of full ones rank 0's count, whatever plan they come from.

        Raises CheckpointError if names, shapes or dtypes are not the model's; no weight has changed then.
        """
        if full:
            load_whole_state(self.local_parameters, state_dict, self._ties)
        else:
            load_local_state(self.local_parameters, state_dict)

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        tokenizer: Any = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        adapter_only: bool = False,
    ) -> None:
        """Write weights in ``dtype``, config and, if given, a Hugging Face ``tokenizer`` for ``from_pretrained``.

        A collective call; rank 0 writes, one tensor at a time.  ``directory`` must be new or empty and appears
        whole or not at all.  An adapter is merged into the weights; with ``adapter_only`` it is written alone, for
        ``PeftModel.from_pretrained``.

        Raises:
            OutputError: the directory is not empty or the disk refuses.
            ConfigError: there is no adapter to write alone, or other parameters were trained too.
        """
        adapter, folder = self.adapter, Path(directory)

        def write(shapes: Shapes, tensors: Iterator[Tensor]) -> None:
            if adapter is not None:
                tensors, shapes = merge(shapes, tensors, adapter), merged_shapes(shapes)
            entries = [Entry(name, dtype, shape) for name, shape in shapes.items()]
            write_hf_directory(folder, self.config, entries, tensors, tokenizer, max_shard_bytes)

        if not adapter_only:
            gather_whole(self.local_parameters, write)
            return
        if adapter is None:
            raise ConfigError("this model has no adapter to write alone; leave adapter_only out")
        check_alone(parameter.name for parameter in self.spec.trained_parameters())
        alone = [part for part in self.local_parameters if is_adapters(part.name)]
        gather_whole(alone, lambda shapes, tensors: write_adapter(folder, adapter, shapes, tensors, dtype, tokenizer))

    def gathered_buffers(self) -> Iterator[Tensor]:
        """What parameters are gathered into (of no bytes while not in use) and flat buffers: to count memory."""
        yield from gathered_buffers(self._sharded)
        for unit in self._unsharded:
            yield from unit.buffers()

    @property
    def _ties(self) -> dict[str, str]:
        tied = self.spec.tied_names
        return {tied[1]: tied[0]} if tied else {}

    if not TYPE_CHECKING:  # a type checker knows what is missing without it

        def __getattr__(self, name: str) -> NoReturn:
            raise refusal(name)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: there is no forward without its backward, nor one process that has all logits."""
        raise UnsupportedError(f"a parallel model cannot be called: {INSTEAD_OF_FORWARD}")

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refused: a copy would lack the processes that hold the rest."""
        raise UnsupportedError(f"a parallel model cannot be copied or pickled: {INSTEAD_OF_COPYING}")

    def _collect_gradients(self) -> None:
        """Point the local tensors at the gradients that units left, then sum what they do not know to be replicated."""
        for parameter in self.local_parameters:
            if parameter.name in self._shards and parameter.tensor.requires_grad:
                gradient = self._shards[parameter.name].grad
                assert isinstance(gradient, DTensor), parameter.name
                parameter.tensor.grad = local_part(gradient)
        for replicated in self._replicated:
            sum_over(replicated.group, [p.tensor.grad for p in replicated.parameters if p.tensor.grad is not None])

    def _given(
        self, input_ids: Tensor | None, labels: Tensor | None, others: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """All inputs by name, and the labels, which a contrast has none of."""
        if labels is None and self.spec.task == "contrast":
            labels = torch.zeros(self.plan.global_batch_size, dtype=torch.int64)
        if labels is None:
            raise DataError("a batch needs labels; give labels=, int64, where what does not count is -100")
        return {**({} if input_ids is None else {"input_ids": input_ids}), **others}, labels

    def _check_contrast(self, *, plain: bool) -> None:
        if self.spec.task == "contrast" and not plain:
            raise ConfigError("a contrast has a loss of its own; leave out loss_fn, label_smoothing and z_loss")

    def _check_carried(self, accumulate: bool) -> None:
        if not accumulate and self._carried != 1.0:
            raise ConfigError(
                f"the last step's gradients still carry fp16's loss scale of {self._carried:.0f}; call the model's "
                "clip_grad_norm_(max_norm), or clip_grad_norm_(None), before every update, or zero_grad() to drop them"
            )

    def _carry(self) -> None:
        """Multiply what gradients there are by the coming step's loss scale."""
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        kept = [p.tensor.grad for p in self.local_parameters if p.tensor.grad is not None]
        if kept and self._carried != scale:
            multiply_all_(kept, torch.tensor(scale / self._carried, device=self.device))
        self._carried = scale

    def _begin(self, accumulate: bool) -> dict[str, Tensor | None]:
        """Forget gradients, or let those of unsharded parameters stay where they are and give the others to add.

        The others are shards, and what the sum over replicas would round once more.
        """
        if not accumulate:
            self.zero_grad()
        self._carry()
        earlier = {name: self._local[name].tensor.grad for name in self._shards}
        for name in self._rounded:
            rounded = self._local[name].tensor
            if rounded.grad is not None:
                earlier[name], rounded.grad = rounded.grad.clone(), None
        for shard in self._shards.values():
            shard.grad = None
        for name, parameter in self._local.items():
            # what stays is summed over all who hold it once more, so it counts on one of them
            if name not in self._shards and parameter.tensor.grad is not None and not parameter.is_primary:
                parameter.tensor.grad.zero_()
        for unit in self._unsharded:
            unit.begin()
        return earlier

    def _add_gradients(self, earlier: Mapping[str, Tensor | None]) -> None:
        for parameter in self.local_parameters:
            before = earlier.get(parameter.name)
            if before is not None and parameter.tensor.grad is not None:
                parameter.tensor.grad.add_(before)

    def _batch(
        self,
        inputs: dict[str, Tensor],
        labels: Tensor,
        weight: float,
        position_ids: Tensor | None,
        loss_fn: LossFunction | None = None,
        terms: LossTerms = PLAIN,
    ) -> Batch:
        """A batch for the driver, of whose padding layers are told as of a document.

        Causal layers need not be told: what counts is before it.
        """
        mask = inputs.get("attention_mask")
        if mask is not None and not all(kind.causal for kind in self.spec.layers):
            position_ids = positions_beside_padding(mask)
        if self.spec.ends == "tokens":
            inputs.pop("attention_mask", None)
        return Batch(inputs, labels, weight, loss_fn, terms, position_ids)

    def _check_step(
        self,
        loss_fn: LossFunction | None,
        position_ids: Tensor | None,
        others: Mapping[str, Tensor],
        *,
        gradients: bool,
    ) -> None:
        """Raise ConfigError if ``loss_fn``, torch's settings or a parameter's place make a step wrong in silence.

        Or if documents that ``position_ids`` tell apart would see each other, or tokens their padding.
        """
        check_surroundings(self.device, gradients=gradients)
        if position_ids is not None:
            check_packing(self.config)
        if others.get("attention_mask") is not None and self.spec.ends == "whole":
            check_padding(self.config)
        if loss_fn is not None and loss_fn is not self._checked_loss:
            check_loss(loss_fn, self.spec.vocab_size, self.device)
            self._checked_loss = loss_fn
        for parameter in self.local_parameters:
            address, requires_grad = self._placed[parameter.name]
            if parameter.tensor.data_ptr() != address:
                raise ConfigError(f"{parameter.name} has lost its storage; change it in place (copy_), not by .data =")
            if parameter.tensor.requires_grad != requires_grad:
                raise ConfigError(
                    f"requires_grad of {parameter.name} was changed after parallelize, which no longer takes effect; "
                    "set it on the Hugging Face model before"
                )
