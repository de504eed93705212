"""Galvatron's own part of every measurement: plans of one device, models with drawn weights, and whole steps.

Takes a Work and a plan; gives what is trained.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from galvatron.core.job import TrainSection
from galvatron.core.model import Precision, Recompute
from galvatron.models import meta_model
from galvatron.parallelize import ParallelModel, World, parallelize
from galvatron.plan import LayerStrategy, Plan
from galvatron.train import PeakMemory, build_optimizer
from galvatron.train.optimizer import update

from .sizes import Batch, Work, config_of


def one_device_plan(work: Work, micro_batch_size: int, precision: Precision, recompute: Sequence[Recompute]) -> Plan:
    """A plan of one device whose layers recompute as given."""
    return Plan(
        model=work.model,
        world_size=1,
        layers_per_stage=(len(recompute),),
        num_microbatches=work.global_batch_size // micro_batch_size,
        global_batch_size=work.global_batch_size,
        seq_len=work.seq_len,
        precision=precision,
        embedding=LayerStrategy(),
        layers=tuple(LayerStrategy(recompute=mode) for mode in recompute),
        head=LayerStrategy(),
    )


def train(model: ParallelModel, optimizer: torch.optim.AdamW, batch: Batch) -> float:
    """A whole step as the trainer takes it; its loss, once all is done."""
    inputs, labels = batch
    loss = model.train_step(labels=labels, **inputs)
    update(optimizer, loss, model.clip_grad_norm_(None), 1.0)
    return float(loss)


def started(plan: Plan, world: World, *, compiled: bool | None = None) -> tuple[ParallelModel, torch.optim.AdamW]:
    """The model that ``plan`` names, with drawn weights, and its optimizer."""
    config, device = config_of(plan.model), world.device
    _let_go(device)
    model = parallelize(meta_model(config), plan, world=world, weights=DrawnWeights(config, device), compile=compiled)
    section = TrainSection(global_batch_size=plan.global_batch_size, seq_len=plan.seq_len, num_steps=1)
    return model, build_optimizer(model.local_parameters, section)


def peak_from_now(device: torch.device) -> PeakMemory:
    """A count of memory that knows nothing of what starting took."""
    _let_go(device)
    return PeakMemory(device)


def _let_go(device: torch.device) -> None:
    """Of what earlier models have left on a GPU, and its allocator keeps."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


class DrawnWeights:
    """Weights of a model by name, drawn where they are asked for: fast, of the usual size, equal for no two calls."""

    origin = "the benchmark"

    def __init__(self, config: PretrainedConfig, device: torch.device) -> None:
        self._device = device
        self._shapes = {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}  # a tied one once

    @property
    def keys(self) -> list[str]:
        return list(self._shapes)

    def find(self, name: str) -> str | None:
        return name if name in self._shapes else None

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        value = torch.empty(size, device=self._device)
        return value.normal_(0, 0.02) if len(size) > 1 else value.fill_(1.0)
