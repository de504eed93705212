"""What is left to do for gradients after the last backward: sums over replicas, the norm, clipping.

FSDP2 has summed over the data-parallel ranks.  A parameter that tensor-parallel ranks hold whole (norms,
row biases) has a partial gradient on each of them, and a tied embedding has two copies across the pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron.internals import multiply_all_, norms

from ..state.pieces import LocalParameter, by_copies

NORM_BLOCK = 1 << 16
"""Elements that a CPU takes the norm of at a time.  Its kernel adds up in float32, one after the other: 4M of them are
off by 8e-5, 67M by 5e-3, in blocks 2e-7; squares that are stored and summed are as exact and take four times as long.
[Empirical: November 2026, torch 2.13]"""


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
    by_replicas: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.tensor.requires_grad:
            assert parameter.tensor.grad is not None, parameter.name
            for copies, gradient in by_copies(parameter, parameter.tensor.grad):
                by_replicas.setdefault(parameter.replicas * copies, []).extend(_blocks(gradient))
    total = torch.zeros((), device=device)
    for replicas, gradients in by_replicas.items():
        total += norms(gradients).square().sum() / replicas
    dist.all_reduce(total)
    return total.sqrt()


def _blocks(gradient: Tensor) -> Sequence[Tensor]:
    flat = gradient.float().reshape(-1)
    return flat.split(NORM_BLOCK) if flat.device.type == "cpu" else (flat,)


def clip(parameters: Iterable[LocalParameter], norm: Tensor, max_norm: float | None, carried: float = 1.0) -> None:
    """Divide all gradients by ``excess`` of their norm and by the loss scale that they carry (their norm does not)."""
    gradients = [p.tensor.grad for p in parameters if p.tensor.grad is not None]
    if gradients:
        multiply_all_(gradients, 1.0 / (excess(norm, max_norm) * carried))


def excess(norm: Tensor, max_norm: float | None) -> Tensor:
    """How many times larger than ``max_norm`` a ``norm`` is, at least 1 (torch's clip_grad_norm_, eps 1e-6)."""
    return torch.ones_like(norm) if max_norm is None else torch.clamp((norm + 1e-6) / max_norm, min=1.0)
