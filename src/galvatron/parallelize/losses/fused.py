"""Projection to the vocabulary and cross entropy in one, by chunks of tokens: whole logits never exist.

The gradients of hidden states and weight are made in the forward pass, while a chunk's logits are at hand (as Liger's
and Apple's fused losses do: Hsu et al. 2024; Wijmans et al. 2024, section 4), so what outlives a chunk is as large as
its inputs, whatever the batch.  Exact for a vocabulary cut along tp: two small reductions a chunk.

T tokens (batch x sequence), H hidden, V vocabulary rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from galvatron.core.family import Logits
from galvatron.core.model import ParameterSpec

from ..layers.later import add_product
from ..layers.tensor_parallel import vocabulary_range
from ..processes.collectives import AxisGroup, all_reduce_
from .early import EarlyGradient

IGNORED = -100
CHUNK_BYTES = 512 * 2**20
"""What a chunk's logits may take, in the compute dtype; their gradient takes their place.  2,048 tokens of a vocabulary
of 128k in bf16: products are large, and the weight's gradient is added to seldom."""
BLOCK_BYTES = 128 * 2**20
"""What a block of a chunk's logits may take in float32, where the compute dtype is another."""


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """What the loss of a token is made of, beside log-sum-exp minus the label's logit z.

    Attributes:
        logit_scale: z = scale x (what the projection gives); applied first.
        soft_cap: z = cap x tanh(z / cap), where given (Gemma 2).
        label_smoothing: the share of the target that is spread over the whole vocabulary (Szegedy et al. 2016).
        z_loss: weight of log-sum-exp squared (PaLM, section 5).
    """

    logit_scale: float = 1.0
    soft_cap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def logits(self, projected: Tensor) -> Tensor:
        """The model's logits, of any shape, from what its projection gives."""
        scaled = projected if self.logit_scale == 1.0 else projected * self.logit_scale
        return scaled if self.soft_cap is None else torch.tanh(scaled / self.soft_cap) * self.soft_cap


PLAIN = LossTerms()


def logit_terms(logits: Logits, config: PretrainedConfig) -> LossTerms:
    """How the model of ``config`` makes logits of what its head gives; all else is plain."""
    scale = getattr(config, logits.scale_by) if logits.scale_by else 1.0
    divisor = getattr(config, logits.divide_by) if logits.divide_by else 1.0
    return LossTerms(
        logit_scale=scale / divisor, soft_cap=getattr(config, logits.soft_cap) if logits.soft_cap else None
    )


def chunk_tokens(vocabulary_rows: int, dtype: torch.dtype) -> int:
    """Tokens whose logits are there at once: the largest power of two that fits."""
    return _fitting(CHUNK_BYTES, vocabulary_rows * dtype.itemsize)


def _fitting(num_bytes: int, token_bytes: int) -> int:
    return 1 << max(num_bytes // token_bytes, 1).bit_length() - 1


def fuse_loss(head: nn.Module, parameter: ParameterSpec, tp: AxisGroup, early: EarlyGradient) -> None:
    """Let ``head``, a linear cut along the vocabulary, give this rank's share of the loss where it is given labels.

    Its forward then takes hidden states [B, S, H], labels int64 [B, S], what a token counts for in the global loss and
    the terms of its own; with hidden states alone it gives this rank's logits [B, S, V] as before.  The weight's
    gradient waits in ``early``.
    """
    start, _ = vocabulary_range(parameter, tp)
    logits_of = head.forward

    def forward(
        hidden_BSH: Tensor, labels_BS: Tensor | None = None, scale: float = 1.0, terms: LossTerms = PLAIN
    ) -> Tensor:
        if labels_BS is None:
            logits: Tensor = logits_of(hidden_BSH)
            return logits
        return projected_cross_entropy_share(
            hidden_BSH.flatten(0, 1),
            head.weight,  # type: ignore[arg-type]
            labels_BS.flatten(),
            start,
            scale,
            tp,
            bias_V=head.bias,  # type: ignore[arg-type]
            vocabulary_size=parameter.shape[0],
            terms=terms,
            early=early,
        )

    head.forward = forward


def projected_cross_entropy_share(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    start: int,
    scale: float,
    tp: AxisGroup,
    *,
    bias_V: Tensor | None = None,
    vocabulary_size: int | None = None,
    terms: LossTerms = PLAIN,
    early: EarlyGradient | None = None,
) -> Tensor:
    """This rank's share of ``scale`` x the summed token losses of hidden @ weightᵀ + bias, a float32 scalar.

    The tp ranks hold rows ``start`` ... of the weight and the same tokens, and end with equal shares (1/tp each) that
    add up to the loss; labels of ``IGNORED`` do not count.  Backward gives the derivative of the *sum* of all shares,
    that of ``hidden_TH`` as this rank's part of a sum over tp.  The share's own gradient must be 1: a loss scale
    belongs in ``scale``.

    Args:
        hidden_TH, weight_VH, bias_V: in the compute dtype, equal on all three.
        labels_T: int64, ids of the whole vocabulary.
        start: this rank's first row.
        scale: what a token counts for in the global loss.
        tp: the ranks that share the vocabulary.
        vocabulary_size: rows of all ranks, needed where tp has several; this rank's if left out.
        terms: see LossTerms.
        early: where the weight's gradient waits; shared by all passes over this weight whose backward is to come.
    """
    assert vocabulary_size is not None or tp.size == 1
    size = weight_VH.shape[0] if vocabulary_size is None else vocabulary_size
    job = _Job(start, scale, tp, size, terms, early or EarlyGradient(), torch.is_grad_enabled())
    share: Tensor = _Projected.apply(hidden_TH, weight_VH, bias_V, labels_T, job)
    return share


@dataclass(frozen=True)
class _Job:
    """What does not change from chunk to chunk."""

    start: int
    scale: float
    tp: AxisGroup
    vocabulary_size: int
    terms: LossTerms
    early: EarlyGradient
    has_backward: bool
    """Whether one will come: a function's forward, where gradients are made here, is told what would need one."""

    @property
    def most_rows(self) -> int:
        """Of the rank that has most, by which all cut tokens alike: every chunk and block is reduced together."""
        return -(-self.vocabulary_size // self.tp.size)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, job: _Job) -> Tensor:
        need_hidden, need_weight, need_bias, *_ = (need and job.has_backward for need in ctx.needs_input_grad)
        made = _Gradients(
            torch.empty_like(hidden) if need_hidden else None,
            job.early.opened(weight) if need_weight else None,
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and need_bias else None,
        )
        total = torch.zeros((), device=hidden.device)
        step = chunk_tokens(job.most_rows, weight.dtype)
        for first in range(0, len(hidden), step):
            chunk = slice(first, first + step)
            total += _take_chunk(hidden[chunk], weight, bias, labels[chunk], job, made.of_chunk(chunk))
        ctx.hidden, ctx.bias, ctx.dtype = made.hidden, made.bias, weight.dtype
        ctx.early = job.early if need_weight else None
        return total * (job.scale / job.tp.size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, ctx.hidden = ctx.hidden, None  # handed on, and not kept until the graph goes
        weight = None if ctx.early is None else ctx.early.closed(ctx.dtype)
        return hidden, weight, None if ctx.bias is None else ctx.bias.to(ctx.dtype), None, None


@dataclass(frozen=True)
class _Gradients:
    """Of the inputs that ask for one; weight's and bias's are summed over chunks in float32, whatever their dtype."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def of_chunk(self, chunk: slice) -> _Gradients:
        """The same with a chunk's rows of hidden states."""
        return replace(self, hidden=None if self.hidden is None else self.hidden[chunk])

    @property
    def are_needed(self) -> bool:
        """Whether any input asks for one."""
        return self.hidden is not None or self.weight is not None or self.bias is not None

    def take(self, grad_logits_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> None:
        """From a chunk's gradient of logits to the inputs that made them."""
        if self.hidden is not None:
            torch.mm(grad_logits_CV, weight_VH, out=self.hidden)
        if self.weight is not None:
            add_product(self.weight, grad_logits_CV, hidden_CH)
        if self.bias is not None:
            self.bias.add_(grad_logits_CV.sum(dim=0, dtype=torch.float32))


def _take_chunk(
    hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_C: Tensor, job: _Job, made: _Gradients
) -> Tensor:
    """A chunk's summed loss (unscaled); its gradients go to ``made``.  All else is gone before the next chunk."""
    logits = F.linear(hidden_CH, weight_VH, bias_V)
    block = len(logits) if logits.dtype == torch.float32 else _fitting(BLOCK_BYTES, 4 * job.most_rows)
    total = torch.zeros((), device=logits.device)
    for own, labels in zip(logits.split(block), labels_C.split(block), strict=True):
        total += _take_block(own, labels, job, need_grad=made.are_needed)
    if made.are_needed:
        made.take(logits, hidden_CH, weight_VH)
    return total


def _take_block(logits_CV: Tensor, labels_C: Tensor, job: _Job, *, need_grad: bool) -> Tensor:
    """The summed loss (unscaled) of a block of logits, which their scaled gradient overwrites where it is needed."""
    z, slope = _final_logits(logits_CV, job.terms)
    loss = _loss_of_block(z, slope, labels_C, job, need_grad=need_grad)
    if z is not logits_CV and need_grad:
        logits_CV.copy_(z)
    return loss


def _final_logits(logits: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor | float]:
    """Scaled and capped logits in float32 (``logits`` itself if that is), and their derivative by the projection's."""
    z = logits.float()
    if terms.logit_scale != 1.0:
        z *= terms.logit_scale
    if terms.soft_cap is None:
        return z, terms.logit_scale
    z.div_(terms.soft_cap).tanh_()
    slope = (1.0 - z.square()).mul_(terms.logit_scale)
    return z.mul_(terms.soft_cap), slope


def _loss_of_block(z_CV: Tensor, slope: Tensor | float, labels_C: Tensor, job: _Job, *, need_grad: bool) -> Tensor:
    """The summed loss (unscaled) of final logits, which are overwritten: by the scaled gradient of the projection."""
    terms, counted = job.terms, labels_C != IGNORED
    peak = z_CV.amax(dim=-1)
    all_reduce_(peak, dist.ReduceOp.MAX, job.tp)
    z_CV -= peak.unsqueeze(-1)
    own = (labels_C >= job.start) & (labels_C < job.start + z_CV.shape[-1])
    index = torch.where(own, labels_C - job.start, 0).unsqueeze(-1)
    target = torch.where(own, z_CV.gather(-1, index).squeeze(-1), 0.0)
    spread = z_CV.sum(dim=-1) if terms.label_smoothing else torch.zeros_like(peak)
    sums = torch.stack([z_CV.exp_().sum(dim=-1), target, spread])
    all_reduce_(sums, dist.ReduceOp.SUM, job.tp)
    log_sum = sums[0].log()
    on_label, on_each = 1.0 - terms.label_smoothing, terms.label_smoothing / job.vocabulary_size
    losses = log_sum - on_label * sums[1] - on_each * sums[2] + terms.z_loss * (log_sum + peak).square()
    if need_grad:
        scale = torch.where(counted, job.scale, 0.0)
        of_log_sum = 1.0 + 2.0 * terms.z_loss * (log_sum + peak)
        z_CV *= (scale * of_log_sum / sums[0]).unsqueeze(-1)
        if on_each:
            z_CV -= (scale * on_each).unsqueeze(-1)
        z_CV.scatter_add_(-1, index, torch.where(own, -scale * on_label, 0.0).unsqueeze(-1))
        if isinstance(slope, Tensor) or slope != 1.0:
            z_CV *= slope
    return torch.where(counted, losses, 0.0).sum()
