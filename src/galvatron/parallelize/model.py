"""ParallelModel: one rank's part of a model under a plan, with steps that give exact gradients."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from galvatron.core.errors import ConfigError
from galvatron.core.model import ModelSpec
from galvatron.core.tasks import TOKEN_TASKS
from galvatron.models import Adapter, blank_inputs

from .accumulation import Gradients, Replicated
from .checks.step import StepCheck, named
from .layers.capacity import Capacity
from .layers.documents import positions_beside_padding
from .layers.randomness import masks_of
from .losses.balance import Balance
from .losses.fused import PLAIN, LossTerms
from .losses.loads import Loads
from .losses.own import LossFunction, terms_of
from .losses.scale import LossScale
from .module import ParallelModule
from .pipeline.driver import Batch, Chunk, Driver
from .pipeline.whole import WholeStage
from .processes.grid import Grid
from .state.pieces import LocalParameter


class ParallelModel(ParallelModule):
    """A model under a plan: parameters are local shards, losses and norms are global.

    It has what a module has where that means something for one process of many; the rest is refused by name.

    Attributes:
        plan, spec, grid, config: what it was made from; ``adapter``: of peft, if it has one.
        stages: this rank's part as modules, one a model chunk, in forward order.
        local_parameters: every parameter this rank holds a part of.
        seed, steps: dropout's masks come from the seed, the number of calls of ``train_step`` so far, and the rank.
            Whoever goes on with a run of his own sets ``steps`` to what it was.
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
        loads: Loads | None = None,
        capacity: Capacity | None = None,
    ) -> None:
        """Made by ``parallelize``; ``shards`` maps names to the FSDP2 parameters behind some of ``parameters``."""
        super().__init__(grid, spec, config, chunks, parameters, adapter)
        self.seed, self.steps, self.compiled = seed, 0, compiled
        scale = LossScale() if self.plan.precision == "fp16" else None
        self._gradients = Gradients(parameters, shards, replicated, self._unsharded, scale, self.device)
        self._check = StepCheck(self.plan, spec, config, parameters, self.device)
        self._driver = Driver(grid, spec, chunks, balance)
        self._loads, self._capacity = loads, capacity

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
                dim 0.  Where images are patches with grids (Qwen-VL), those of the whole batch, in the order of texts.
                ``attention_mask``, int64 or bool [global_batch_size, seq_len], is 1 for a row's tokens and then
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
        inputs = named({"input_ids": input_ids, "position_ids": position_ids, **others})
        plain = loss_fn is None and not label_smoothing and not z_loss
        self._check.before(loss_fn, inputs, plain=plain, gradients=True)
        self._gradients.check(accumulate=accumulate)
        terms, labels = terms_of(loss_fn, label_smoothing, z_loss), self._check.labels(labels)
        weight = self._check.train_batches.weight(inputs, labels, num_tokens=num_tokens, accumulate=accumulate)
        self._gradients.begin(accumulate=accumulate)
        if self._loads is not None and not accumulate:
            self._loads.begin()
        if self._capacity is not None and not accumulate:
            self._capacity.begin()
        carried = self._gradients.carried
        with masks_of(self.seed, self.steps, self.grid.world.rank, self.device):
            for stage in self.stages:
                if isinstance(stage, WholeStage):
                    stage.masks.begin(self.seed, self.steps, self.grid.world.rank, self.device)
            batch = self._batch(inputs, labels, carried * weight, loss_fn, terms)
            scaled = self._driver.train(replace(batch, scale=carried))
        self._gradients.end()
        self.steps += 1
        return scaled / carried

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
        if packed and self.spec.ends == "whole":
            inputs["attention_mask"] = torch.ones((rows, seq_len), dtype=torch.int64, device=self.device)
        elif packed:
            inputs["position_ids"] = torch.arange(seq_len).expand(rows, seq_len)
        zeros, training = self._batch(inputs, labels, 1.0), self.training
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
        inputs = named({"input_ids": input_ids, "position_ids": position_ids, **others})
        return self._evaluate(inputs, labels, loss_fn)

    def evaluate_classes(self, labels: Tensor | None = None, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """As ``evaluate``, where samples have classes: the mean loss, and which share of them has the largest logit at
        its own class; of a contrast, which has no labels, which share of texts and of images goes best with its own.
        """
        if self.spec.task in TOKEN_TASKS:
            raise ConfigError(f"{self.spec.name} is trained for {self.spec.task}, which has no classes; call evaluate")
        loss, share = self._evaluate(named(inputs), labels, None, scores=True)
        return loss, share

    @torch.no_grad()
    def _evaluate(
        self, inputs: dict[str, Tensor], labels: Tensor | None, loss_fn: LossFunction | None, *, scores: bool = False
    ) -> Tensor:
        self._check.before(loss_fn, inputs, plain=loss_fn is None, gradients=False)
        labels = self._check.labels(labels)
        weight = self._check.evaluation_batches.weight(inputs, labels)
        training = self.training
        self.eval()
        batch = replace(self._batch(inputs, labels, weight, loss_fn), scores=scores)
        loss = self._driver.evaluate(batch)
        self.train(training)
        return loss

    @property
    def loss_scale(self) -> LossScale | None:
        """Under fp16, what the loss of the next step is multiplied by: part of a run of your own."""
        return self._gradients.loss_scale

    @loss_scale.setter
    def loss_scale(self, scale: LossScale | None) -> None:
        self._gradients.loss_scale = scale

    def zero_grad(self) -> None:
        """Forget all gradients; ``train_step`` does so itself unless it accumulates."""
        self._gradients.zero()

    def grad_norm(self) -> Tensor:
        """The global norm of the gradients, without the loss scale that they may carry: a float32 scalar."""
        return self._gradients.norm()

    def clip_grad_norm_(self, max_norm: float | None) -> Tensor:
        """The global gradient norm, before scaling gradients down to ``max_norm`` if it is given; a float32 scalar.

        Under fp16, between ``train_step`` and every update: takes the loss scale out of the gradients, and moves it for
        the next step.  Where they overflowed (the norm is then inf or nan, on all ranks) there are none afterwards, so
        that an optimizer's step changes nothing.
        """
        return self._gradients.clip(max_norm)

    def move_router_biases(self, rate: float) -> None:
        """After an update: move every expert's bias by ``rate``, up if fewer rows than the mean chose it in the step.

        Biases count where experts are chosen and have no gradient (DeepSeek-V3, section 2.1.2, with a rate of 0.001).
        Collective over the world.

        Raises:
            ConfigError: the model's routers have none.
        """
        if self._loads is None:
            raise ConfigError(f"routers of {self.spec.name} have no biases that even out loads; leave them alone")
        self._loads.move(rate)

    @property
    def capacity_factor(self) -> float | None:
        """What experts take of an even load; None where no choice is ever dropped."""
        return None if self._capacity is None else self._capacity.factor

    def dropped_choices(self) -> Tensor:
        """How many choices of experts the last step dropped: an int64 scalar, equal on all ranks.  Collective.

        Raises:
            ConfigError: the model was made without a ``capacity_factor``.
        """
        if self._capacity is None:
            raise ConfigError("experts without a capacity drop nothing; give parallelize a capacity_factor")
        return self._capacity.dropped()

    def _batch(
        self,
        inputs: dict[str, Tensor],
        labels: Tensor,
        weight: float,
        loss_fn: LossFunction | None = None,
        terms: LossTerms = PLAIN,
    ) -> Batch:
        """A batch for the driver, of whose padding layers are told as of a document.

        Causal layers need not be told: what counts is before it.
        """
        if self.spec.task == "contrast":
            inputs.pop("attention_mask", None)  # which says nothing there (checks.packing)
        positions, mask = inputs.pop("position_ids", None), inputs.get("attention_mask")
        if mask is not None and not all(kind.causal for kind in self.spec.layers):
            positions = positions_beside_padding(mask)
        if self.spec.ends == "tokens":
            inputs.pop("attention_mask", None)
        return Batch(inputs, labels, weight, loss_fn, terms, positions)
