"""The loss of samples that have a class each: every tensor-parallel rank has the logits of the same samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..processes.collectives import AxisGroup
from .fused import IGNORED, LossTerms
from .own import LossFunction


def sample_loss_share(
    logits_BC: Tensor, labels_B: Tensor, weight: float, terms: LossTerms, loss_fn: LossFunction | None, tp: AxisGroup
) -> Tensor:
    """This rank's share of ``weight`` x the summed losses of labelled samples, a float32 scalar: 1/tp of all."""
    logits = logits_BC.float()
    if loss_fn is not None:
        counted = labels_B != IGNORED
        losses = loss_fn(logits[counted], labels_B[counted])
        return losses.sum() * (weight / tp.size)
    loss = F.cross_entropy(logits, labels_B, reduction="sum", label_smoothing=terms.label_smoothing)
    if terms.z_loss:
        squares = torch.logsumexp(logits, dim=-1).square()
        loss = loss + terms.z_loss * torch.where(labels_B == IGNORED, 0.0, squares).sum()
    return loss * (weight / tp.size)


def right_share(logits_BC: Tensor, labels_B: Tensor, weight: float, tp: AxisGroup) -> Tensor:
    """This rank's share of ``weight`` x the number of labelled samples whose own class has the largest logit."""
    return (logits_BC.argmax(dim=-1) == labels_B).sum().float() * (weight / tp.size)  # no class is called IGNORED
