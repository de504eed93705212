"""What one process computes: the truth that every plan is held against.

Takes an unmodified Hugging Face model and a training recipe; gives the losses, gradients, parameters and AdamW
states of a few steps, in float32 or in a half precision over float32 parameters. Knows nothing of plans or
processes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel

from galvatron.core.errors import ConfigError
from galvatron.core.model import Precision
from galvatron.core.tasks import TOKEN_TASKS
from galvatron.models import Adapter, adapter_of, auto_class, buffers_within, config_of, random_inputs, task_of
from galvatron.models.inputs import words_of
from galvatron.models.lora import attach
from galvatron.parallelize.sharding.fsdp import DTYPES
from galvatron.train.offload import OffloadedAdamW

IGNORED = -100
FP16_SCALE = 2.0**10
"""Of the loss under fp16: with the few tokens of a test, each counts for so much that 2^16 overflows."""
Tensors = dict[str, torch.Tensor]
Batch = tuple[Tensors, torch.Tensor]
"""Inputs by name, and labels."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the steps of a parity check are trained.

    ``eps`` is far above AdamW's usual 1e-8, for a reason.  The update lr·m/(√v + eps) of an element whose
    gradient is all rounding noise is ±lr at random if eps is below the noise, so two correct runs would
    differ by lr.  With eps well above it, an error δ of a gradient moves a parameter by at most lr·δ/eps a
    step: parameters can be compared as tightly as gradients.  The arithmetic is the same for any eps.
    [Empirical: November 2026, CPU: one process with and without gradient accumulation, tiny GPT-2: the key
    part of the fused bias, whose true gradient is zero, differs by 5e-4 with eps 1e-8, by 1e-7 with 1e-4.]

    ``lr`` keeps lr·δ/eps under the tolerance, yet three steps move every tensor by 2e-3 of its size or more:
    200 times the tolerance of parameters, so that a step with a wrong sum or decay cannot hide.

    ``num_microbatches`` counts where routers have an auxiliary loss, which is the mean over them.
    """

    num_steps: int = 3
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-4
    weight_decay: float = 0.1
    max_grad_norm: float | None = None
    num_microbatches: int = 1
    seed: int = 0

    def optimizer(
        self,
        parameters: list[torch.nn.Parameter],
        hosted: Mapping[torch.nn.Parameter, str] | None = None,
        *,
        fused: bool = False,
    ) -> torch.optim.AdamW:
        """AdamW over ``parameters``, all of them decayed: the rule is elementwise, so any cut must obey it.

        There may be none: all that a rank holds may be frozen.  ``hosted``: those with moments in host memory, which
        the fused kernel updates; ``fused``: it updates the others too, so that ranks without such end with equal bits.
        """
        groups: list[dict[str, Any]] = [{"params": parameters}]
        options: dict[str, Any] = {"lr": self.lr, "betas": self.betas, "eps": self.eps, "fused": fused or bool(hosted)}
        options["weight_decay"] = self.weight_decay
        return OffloadedAdamW(groups, hosted, **options) if hosted else torch.optim.AdamW(groups, **options)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: its batch (inputs by name, int64 labels), and the loss, norm and gradients it gave.

    Gradients are those before clipping, by global parameter name.
    """

    inputs: Tensors
    labels: torch.Tensor
    loss: float
    grad_norm: float
    gradients: Tensors


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A whole run: where it started, its steps, and where it ended (loss of the first batch included).

    ``frozen`` parameters have no gradients and no AdamW states; ``precision`` is what layers computed in; ``adapter``:
    of peft, if the model has one.
    """

    recipe: Recipe
    precision: Precision
    config: PretrainedConfig
    adapter: Adapter | None = None
    frozen: frozenset[str]
    initial: Tensors
    steps: tuple[Step, ...]
    final_loss: float
    parameters: Tensors
    exp_avg: Tensors
    exp_avg_sq: Tensors

    def model(self) -> PreTrainedModel:
        """A new Hugging Face model with the initial weights."""
        return restore(self.config, self.initial, self.frozen, self.adapter)

    def save(self, path: Path) -> None:
        """Write it for other processes of this machine."""
        torch.save(self, path)

    @staticmethod
    def load(path: Path) -> Reference:
        """Map a file that ``save`` wrote: ranks share its pages, and read only what they compare."""
        # our own file in our own temporary folder, hence safe to unpickle
        reference: Reference = torch.load(path, mmap=True, weights_only=False)
        return reference


def train_reference(
    model: PreTrainedModel,
    global_batch_size: int,
    seq_len: int,
    recipe: Recipe | None = None,
    precision: Precision = "fp32",
    *,
    exact: bool = False,
) -> Reference:
    """Train a copy of ``model`` in ``precision`` for ``recipe.num_steps`` steps of AdamW; ``model`` stays as it is.

    What does not require a gradient in ``model`` is frozen in the copy.  ``exact``: in float64, as far as the model's
    own casts let it, in the place of float32.

    Raises:
        ConfigError: the model has dropout, which no two layouts draw alike.
    """
    recipe = recipe or Recipe()
    _refuse_dropout(model)
    lasting = _snapshot(buffers_within(model))
    initial = _snapshot(dict(model.named_parameters())) | lasting
    frozen = frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    config, adapter = config_of(model), adapter_of(model)
    twin = restore(config, initial, frozen, adapter)
    twin = twin.double() if exact else twin
    parameters = dict(twin.named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if name not in frozen}
    optimizer = recipe.optimizer(list(trained.values()))
    batches = make_batches(recipe, config, global_batch_size, seq_len)
    steps = tuple(_step(twin, optimizer, batch, recipe, precision) for batch in batches)
    states = {name: optimizer.state[p] for name, p in trained.items() if p in optimizer.state}  # the loss needs these
    with torch.no_grad():
        final_loss = mean_loss(twin, *batches[0], precision, recipe.num_microbatches).item()
    return Reference(
        recipe=recipe,
        precision=precision,
        config=config,
        adapter=adapter,
        frozen=frozen | lasting.keys(),
        initial=initial,
        steps=steps,
        final_loss=final_loss,
        parameters={name: parameter.detach().clone() for name, parameter in parameters.items()} | lasting,
        exp_avg={name: state["exp_avg"] for name, state in states.items()},
        exp_avg_sq={name: state["exp_avg_sq"] for name, state in states.items()},
    )


def make_batches(recipe: Recipe, config: PretrainedConfig, global_batch_size: int, seq_len: int) -> list[Batch]:
    """One batch a step, drawn from the recipe's seed; labels of causal language models are shifted, some are ignored.

    Every fifth label or so is ignored, and (where there are several) all of the last sequence: ranks and
    microbatches then count different numbers of tokens, down to none, so that any mean of means shows.
    """
    generator, task = torch.Generator().manual_seed(recipe.seed), task_of(config)
    batches: list[Batch] = []
    for _ in range(recipe.num_steps):
        if task == "causal_lm":
            tokens = torch.randint(config.vocab_size, (global_batch_size, seq_len + 1), generator=generator)
            inputs, labels = {"input_ids": tokens[:, :-1].contiguous()}, tokens[:, 1:].clone()
        else:
            inputs = random_inputs(config, task, global_batch_size, seq_len, generator)
            of_tokens = task in TOKEN_TASKS
            shape = (global_batch_size, seq_len) if of_tokens else (global_batch_size,)
            labels = torch.randint(
                words_of(config) if of_tokens else int(config.num_labels or 1), shape, generator=generator
            )
        whole = labels.clone()
        if task == "contrast":
            batches.append((inputs, torch.zeros_like(labels)))
            continue
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORED
        counts = (slice(None), 0) if labels.dim() > 1 else 0
        labels[counts] = whole[counts]  # at least one does
        if global_batch_size > 1:
            labels[-1] = IGNORED
        batches.append((inputs, labels))
    return batches


def mean_loss(
    model: PreTrainedModel,
    inputs: Tensors,
    labels: torch.Tensor,
    precision: Precision = "fp32",
    num_microbatches: int = 1,
) -> torch.Tensor:
    """Mean cross entropy of what counts, a float32 scalar; ``precision`` is what the model computes in.

    With the model's own auxiliary loss of routers, if its config asks for it: the mean over microbatches.
    """
    dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else DTYPES[precision]
    weights = {name: parameter.to(dtype) for name, parameter in model.named_parameters()}
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    given = {name: v.to(dtype) if v.is_floating_point() else v for name, v in inputs.items()}
    if task_of(config_of(model)) == "contrast":
        outputs = functional_call(model, weights, kwargs={**given, "return_loss": True})
        own: torch.Tensor = outputs.loss
        return own if precision == "fp32" else pair_loss(outputs.logits_per_text.float(), hasattr(model, "logit_bias"))
    logits = functional_call(model, weights, kwargs={**given, **options}).logits
    logits = logits if dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
    if not getattr(model.config, "output_router_logits", False):
        return loss
    parts = zip(*(values.chunk(num_microbatches) for values in given.values()), strict=True)
    each = [
        functional_call(model, weights, kwargs={**dict(zip(given, part, strict=True)), **options}) for part in parts
    ]
    return loss + model.config.router_aux_loss_coef * torch.stack([output.aux_loss for output in each]).mean()


def pair_loss(logits: torch.Tensor, has_bias: bool) -> torch.Tensor:
    """What CLIP, or with a bias SigLIP, makes of float32 logits [texts, images], where its own halves would round."""
    if has_bias:
        sign = 2 * torch.eye(len(logits)) - 1
        return -F.logsigmoid(sign * logits).sum(dim=1).mean()
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2


def restore(
    config: PretrainedConfig, weights: Tensors, frozen: Collection[str] = (), adapter: Adapter | None = None
) -> PreTrainedModel:
    """A float32 Hugging Face model of ``config`` in training mode with copies of ``weights``; ``frozen`` ones stay."""
    model = auto_class(config).from_config(copy.deepcopy(config), dtype=torch.float32)
    if adapter is not None:
        attach(model, adapter.name, adapter.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
            parameter.requires_grad_(name not in frozen)
        for name, buffer in buffers_within(model).items():
            buffer.copy_(weights[name])
    return model.train()


def _step(
    model: PreTrainedModel,
    optimizer: torch.optim.AdamW,
    batch: Batch,
    recipe: Recipe,
    precision: Precision,
) -> Step:
    optimizer.zero_grad()
    loss = mean_loss(model, *batch, precision, recipe.num_microbatches)
    scale = FP16_SCALE if precision == "fp16" else 1.0
    (loss * scale).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= scale
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    limit = float("inf") if recipe.max_grad_norm is None else recipe.max_grad_norm
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
    optimizer.step()
    inputs, labels = batch
    return Step(inputs=inputs, labels=labels, loss=loss.item(), grad_norm=grad_norm, gradients=gradients)


def _snapshot(parameters: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: parameter.detach().float().clone() for name, parameter in parameters.items()}


def _refuse_dropout(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, torch.nn.Dropout) else getattr(module, "attention_dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            raise ConfigError(
                f"parity needs a model without dropout but {name} drops {rate}; set it to 0 in the config"
            )
