"""What is left to do for gradients after the last backward: sums over replicas, the norm, clipping.

FSDP2 has summed over the data-parallel ranks.  A parameter that tensor-parallel ranks hold whole (norms,
row biases) has a partial gradient on each of them, and a tied embedding has two copies across the pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron.internals import multiply_all_

from ..state.pieces import LocalParameter


def sum_over(group: dist.ProcessGroup, gradients: list[Tensor]) -> None:
    """Sum ``gradients`` over ``group`` in place, as one message."""
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def global_norm(parameters: Iterable[LocalParameter], device: torch.device) -> Tensor:
    """The 2-norm of the whole model's gradient, equal on all ranks (float32 scalar on ``device``).

    Every part counts 1/replicas on each rank that holds it, so one sum over the world is exact.
    """
    total = torch.zeros((), device=device)
    for parameter in parameters:
        if not parameter.tensor.requires_grad:
            continue
        assert parameter.tensor.grad is not None, parameter.name
        total += parameter.tensor.grad.float().square().sum() / parameter.replicas
    dist.all_reduce(total)
    return total.sqrt()


def clip(parameters: Iterable[LocalParameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients by max_norm / norm where the norm is larger (torch's clip_grad_norm_, eps 1e-6)."""
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    gradients = [p.tensor.grad for p in parameters if p.tensor.grad is not None]
    if gradients:
        multiply_all_(gradients, scale)
