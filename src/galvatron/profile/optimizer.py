"""How long AdamW takes for every fp32 element it updates.

Takes a ModelSpec and a world; gives seconds per element, equal on all ranks.  Knows nothing of plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from galvatron.core.model import ModelSpec
from galvatron.parallelize.processes.world import World

from .timing import slowest_median

ENOUGH_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""With gradients and moments 256 MiB and 2 GiB: far beyond caches, and beyond what the call itself takes.  [Empirical:
2026-11, one H200: 2²⁴ elements took 0.27 ms, of which their traffic is 0.11]"""
REPEATS = 5


def measure_optimizer(spec: ModelSpec, world: World) -> float:
    """Collective: median seconds of one fused AdamW step on the slowest rank, divided by the elements it updates.

    Steps the parameters of the model's layers until enough elements are reached, because the time of small models
    is dispatch and that of large ones memory traffic.  All ranks step at once.
    """
    parameters = [
        torch.nn.Parameter(torch.zeros(shape, device=world.device))
        for shape in _shapes(spec, ENOUGH_ELEMENTS[world.device.type])
    ]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    optimizer.step()  # makes the moments
    return slowest_median(optimizer.step, world.device, REPEATS) / sum(p.numel() for p in parameters)


def _shapes(spec: ModelSpec, enough: int) -> Iterator[tuple[int, ...]]:
    elements = 0
    for parameter in (parameter for kind in spec.kind_of_layers() for parameter in kind.parameters):
        if elements >= enough:
            return
        elements += math.prod(parameter.shape)
        yield parameter.shape
