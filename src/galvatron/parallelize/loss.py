"""Cross entropy over a vocabulary cut along tp, in float32.

T tokens (batch x sequence), V vocabulary rows of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import AxisGroup

IGNORED = -100


def cross_entropy_share(logits_TV: Tensor, labels_T: Tensor, start: int, weight: float, tp: AxisGroup) -> Tensor:
    """This rank's share of ``weight`` x the summed token losses, a float32 scalar.

    The tp ranks hold the logits of rows ``start`` ... of the same tokens and end with equal shares (1/tp each)
    that add up to the loss; labels of ``IGNORED`` do not count.  Backward gives the derivative of the *sum* of
    all shares with respect to the local logits, so every rank must pass the same gradient (1).
    """
    share: Tensor = _CrossEntropy.apply(logits_TV, labels_T, start, weight, tp)
    return share


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, start: int, weight: float, tp: AxisGroup) -> Tensor:
        logits32 = logits.float()
        peak = logits32.amax(dim=-1)
        _all_reduce(peak, dist.ReduceOp.MAX, tp)
        own = (labels >= start) & (labels < start + logits.shape[-1])
        index = torch.where(own, labels - start, 0).unsqueeze(-1)
        target = torch.where(own, logits32.gather(-1, index).squeeze(-1) - peak, 0.0)
        sums = torch.stack([torch.exp(logits32 - peak.unsqueeze(-1)).sum(dim=-1), target])
        _all_reduce(sums, dist.ReduceOp.SUM, tp)
        log_sum = sums[0].log()
        ctx.save_for_backward(logits, log_sum + peak, labels)
        ctx.start, ctx.weight = start, weight
        losses = torch.where(labels == IGNORED, 0.0, log_sum - sums[1])
        return losses.sum() * (weight / tp.size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, log_sum_exp, labels = ctx.saved_tensors
        start, columns = ctx.start, logits.shape[-1]
        scale = torch.where(labels == IGNORED, 0.0, ctx.weight) * grad
        grad_logits = torch.exp(logits.float() - log_sum_exp.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
        own = (labels >= start) & (labels < start + columns)
        index = torch.where(own, labels - start, 0).unsqueeze(-1)
        grad_logits.scatter_add_(-1, index, torch.where(own, -scale, 0.0).unsqueeze(-1))
        return grad_logits.to(logits.dtype), None, None, None, None


def _all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType, tp: AxisGroup) -> None:
    if tp.group is not None:
        dist.all_reduce(x, op=op, group=tp.group)
