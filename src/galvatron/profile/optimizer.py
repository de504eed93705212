"""How long AdamW takes for every fp32 element it updates.

Takes a ModelSpec and a world; gives seconds per element, equal on all ranks.  Knows nothing of plans.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from galvatron.core.model import ModelSpec

from .timing import slowest_median

if TYPE_CHECKING:
    from galvatron.parallelize.world import World

MAX_ELEMENTS = 2**24  # with gradients and moments 256 MiB: far beyond caches, little beside a model
REPEATS = 5


def measure_optimizer(spec: ModelSpec, world: World) -> float:
    """Collective: median seconds of one fused AdamW step on the slowest rank, divided by the elements it updates.

    Steps the parameters of as many whole layers as fit in 2²⁴ elements (one at least), because the time of
    small models is dispatch and that of large ones memory traffic.  All ranks step at once.
    """
    layers = max(1, min(spec.num_layers, MAX_ELEMENTS // spec.layer.num_parameters))
    shapes = list(itertools.chain.from_iterable([[p.shape for p in spec.layer.parameters]] * layers))
    parameters = [torch.nn.Parameter(torch.zeros(shape, device=world.device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    optimizer.step()  # makes the moments
    return slowest_median(optimizer.step, world.device, REPEATS) / sum(p.numel() for p in parameters)
