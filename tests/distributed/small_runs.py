"""Plans of four ranks for the tiny GPT-2, batches for them, and how far gradients are from plain transformers'."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from galvatron.parallelize import ParallelModel
from galvatron.parallelize.state.pieces import box
from galvatron.plan import LayerStrategy, Plan

TP, ZERO3, REPLICAS = LayerStrategy(tp=2), LayerStrategy(dp_shard=2, zero=3), LayerStrategy(dp_replicate=2)
WIDE = LayerStrategy(tp=2, dp_shard=2, zero=2)


def plan_for(stages: tuple[int, ...], ends: LayerStrategy, *layers: LayerStrategy, microbatches: int = 1) -> Plan:
    return Plan(
        model="tiny", world_size=4, layers_per_stage=stages, embedding=ends, layers=layers, head=ends,
        num_microbatches=microbatches, global_batch_size=4, seq_len=16,
    )  # fmt: skip


PIPELINE = plan_for((1, 3), TP, ZERO3, TP, REPLICAS, ZERO3, microbatches=2)
MIXED = plan_for((4,), WIDE, LayerStrategy(tp=4), LayerStrategy(dp_shard=4, zero=1), WIDE, LayerStrategy(tp=4))


def batch(seed: int, ignored: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 97, (4, 17), generator=torch.Generator().manual_seed(seed))
    labels = tokens[:, 1:].clone()
    labels.view(-1)[:ignored] = -100
    return tokens[:, :-1], labels


def worst_error(model: ParallelModel, truth: PreTrainedModel) -> float:
    """Of this rank's gradients, relative to the largest of each whole one."""
    wholes = dict(truth.named_parameters())
    errors = [0.0]
    for part in model.local_parameters:
        if not part.tensor.requires_grad:
            continue
        whole = wholes[part.name].grad
        assert whole is not None
        assert part.tensor.grad is not None
        for piece in part.pieces:
            mine, theirs = (
                box(part.tensor.grad, piece.local_offset, piece.size),
                box(whole, piece.global_offset, piece.size),
            )
            errors.append(float((mine - theirs).abs().max() / whole.abs().max()))
    return max(errors)
