"""Whether all ranks were given the same: what differs in silence (weights drawn anew by each) trains no one model."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from galvatron.core.errors import ConfigError
from galvatron.plan import Plan

from ..processes.ranks import all_gather, communication_device, world_size

SAMPLE = 64
"""Elements of a weight's first row that are compared: of two that were drawn apart, all differ."""


def check_agreement(
    model: PreTrainedModel, plan: Plan, seed: int, capacity_factor: float | None = None, *, own_weights: bool
) -> None:
    """Raise ConfigError, on all ranks, unless what they were given is that of rank 0.  Collective over the world.

    ``own_weights``: the model's values are used, so they must agree too (a sample of every tensor is compared).
    """
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    given = {
        "plan": plan.to_json().encode(),
        "model": repr(shapes).encode(),
        "seed": repr(seed).encode(),
        "capacity_factor": repr(capacity_factor).encode(),
        "weights": b"".join(_samples(model)) if own_weights else b"",
    }
    found = disagreement({name: zlib.crc32(value) for name, value in given.items()})
    if found is None:
        return
    name, others = found
    remedy = f"give one {name}"
    if name == "weights":
        remedy = "load them from one place, or draw them after one torch.manual_seed"
    ranks = ", ".join(map(str, others))
    raise ConfigError(f"every rank must be given the same {name}, but rank {ranks} has other than rank 0; {remedy}")


def disagreement(digests: Mapping[str, int]) -> tuple[str, list[int]] | None:
    """The first of ``digests`` that is not equal on all ranks, and the ranks where it is not rank 0's.

    Collective; one reduction of two integers each where all agree.
    """
    if world_size() == 1:
        return None
    values = torch.tensor(list(digests.values()), device=communication_device())
    extremes = torch.stack([values, -values])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if torch.equal(extremes[0], -extremes[1]):
        return None
    everyones = all_gather(dict(digests))
    return next(
        (name, others)
        for name in digests
        if (others := [rank for rank, theirs in enumerate(everyones) if theirs[name] != everyones[0][name]])
    )


def _samples(model: PreTrainedModel) -> Iterator[bytes]:
    for parameter in model.parameters():
        if parameter.is_meta or parameter.numel() == 0:
            yield b"none"
        else:
            row = parameter.detach()[(0,) * (parameter.dim() - 1)] if parameter.dim() else parameter.detach()
            yield row.reshape(-1)[:SAMPLE].float().cpu().numpy().tobytes()
