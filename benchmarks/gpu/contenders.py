"""Ways to train one model on one device: Galvatron's, and those that a user would write instead.

A contender is made from a Work and a size of microbatch, and gives ``step(batch)``: forward, backward, clip and
update of a whole global batch, weights in float32, compute in bf16 on a GPU.  All are given the same CPU tensors.
Between its turns a contender keeps no memory: ``park`` frees the storages of all that lasts, ``unpark`` takes as much
again, with values of the usual size (times, and the power drawn, depend on little else).
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from galvatron.core.model import Recompute
from galvatron.models import auto_class, build_spec, task_of
from galvatron.parallelize import init_world

from .runs import one_device_plan, started, train
from .sizes import Batch, Device, Work, config_of

LR, BETAS, DECAY = 3e-4, (0.9, 0.95), 0.1  # as Galvatron's by default
NEEDS = {"liger": "liger_kernel", "liger, compiled layers": "liger_kernel", "accelerate": "accelerate"}
"""Packages that some contenders need."""


class Contender(Protocol):
    """See the module."""

    def step(self, batch: Batch) -> float:
        """Train on a global batch; its mean loss, once all is done."""
        ...

    def lasting(self) -> Iterable[Tensor]:
        """What is there between two steps: weights, moments, buffers for gradients."""
        ...


def missing(name: str, device: Device) -> str | None:
    """Why the contender cannot be tried here."""
    if "compiled" in name and not device.is_gpu:
        return "compiling takes half a minute on a CPU"
    needed = NEEDS.get(name)
    if needed is not None and importlib.util.find_spec(needed) is None:
        return f"{needed.replace('_', '-')} is not installed"
    return None


def rungs(name: str, work: Work) -> list[tuple[int, Recompute]]:
    """What is tried in turn until it fits: less recompute first, then smaller microbatches."""
    modes: tuple[Recompute, ...] = ("none", "selective") if name == "galvatron" else ("none",)
    return [(size, mode) for size in work.sizes for mode in modes]


def make(name: str, work: Work, micro_batch_size: int, recompute: Recompute, device: torch.device) -> Contender:
    """The contender called ``name``; ImportError where it needs what is not there."""
    if name == "galvatron":
        return Galvatron(work, micro_batch_size, recompute, device)
    if name == "accelerate":
        return Accelerated(work, micro_batch_size, device)
    return Plain(name, work, micro_batch_size, device)


class Galvatron:
    """The plan of one device."""

    def __init__(self, work: Work, micro_batch_size: int, recompute: Recompute, device: torch.device) -> None:
        config, precision = config_of(work.model), "bf16" if device.type == "cuda" else "fp32"
        plan = one_device_plan(work, micro_batch_size, precision, [recompute] * build_spec(config).num_layers)
        world = init_world("cuda" if device.type == "cuda" else "cpu")
        self._model, self._optimizer = started(plan, world)

    def step(self, batch: Batch) -> float:
        model = self._model
        # parking has moved the weights, which a step would otherwise take for replaced
        model._check.place()
        return train(model, self._optimizer, batch)

    def lasting(self) -> Iterable[Tensor]:
        yield from self._model.parameters()
        yield from self._model.gathered_buffers()
        yield from _moments(self._optimizer)


class Plain:
    """transformers' own model and a loop of one's own; ``name`` says what is done to it."""

    def __init__(self, name: str, work: Work, micro_batch_size: int, device: torch.device) -> None:
        self._work, self._micro_batch_size, self._device = work, micro_batch_size, device
        if name.startswith("liger"):
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()  # for all models of this process
        self._model = hugging_face(work, device)
        self._forward: Any = self._model
        if name == "compiled":
            self._forward = torch.compile(self._model)
        elif name.endswith("compiled layers"):
            for module in self._model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.compile()
        self._optimizer = _adamw(self._model)

    def step(self, batch: Batch) -> float:
        total = torch.zeros((), device=self._device)
        rows = self._micro_batch_size
        for own in microbatches(self._work, batch, rows, self._device):
            with torch.autocast("cuda", torch.bfloat16, enabled=self._device.type == "cuda"):
                loss = _loss(self._forward, own) * (rows / self._work.global_batch_size)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(total)

    def lasting(self) -> Iterable[Tensor]:
        yield from self._model.parameters()
        yield from _moments(self._optimizer)


class Accelerated:
    """The same model under accelerate, its gradients accumulated by it."""

    def __init__(self, work: Work, micro_batch_size: int, device: torch.device) -> None:
        from accelerate import Accelerator

        self._micro_batch_size, on_gpu = micro_batch_size, device.type == "cuda"
        self._accelerator = Accelerator(
            mixed_precision="bf16" if on_gpu else "no",
            gradient_accumulation_steps=work.global_batch_size // micro_batch_size,
            cpu=not on_gpu,
        )
        self._device = device
        model = hugging_face(work, device)
        self._model, self._optimizer = self._accelerator.prepare(model, _adamw(model))

    def step(self, batch: Batch) -> float:
        total = torch.zeros((), device=self._device)
        parts = list(microbatches(self._work, batch, self._micro_batch_size, self._device))
        for own in parts:
            with self._accelerator.accumulate(self._model):
                loss = _loss(self._model, own)
                self._accelerator.backward(loss)
                if self._accelerator.sync_gradients:
                    self._accelerator.clip_grad_norm_(self._model.parameters(), 1.0)
                self._optimizer.step()
                self._optimizer.zero_grad()
            total += loss.detach() / len(parts)
        return float(total)

    def lasting(self) -> Iterable[Tensor]:
        yield from self._model.parameters()
        yield from _moments(self._optimizer)


def hugging_face(work: Work, device: torch.device) -> Any:
    """The model in float32 on ``device``, initialised there."""
    torch.set_float32_matmul_precision("high")
    with device:
        config = config_of(work.model)
        model = auto_class(config).from_config(copy.deepcopy(config), dtype=torch.float32)
    return model.train()


def microbatches(work: Work, batch: Batch, rows: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """What transformers' models take, ``rows`` samples at once; pairs have no labels."""
    inputs, labels = batch
    given = inputs if task_of(config_of(work.model)) == "contrast" else inputs | {"labels": labels}
    for parts in zip(*(value.split(rows) for value in given.values()), strict=True):
        yield {name: part.to(device) for name, part in zip(given, parts, strict=True)}


def _loss(forward: Any, given: dict[str, Tensor]) -> Tensor:
    """The mean over what counts; of causal models transformers shifts labels itself, so that last tokens have none."""
    options = {"return_loss": True} if "labels" not in given else {}
    options |= {"use_cache": False} if "use_cache" in inspect.signature(forward.forward).parameters else {}
    loss: Tensor = forward(**given, **options).loss
    return loss


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)


def _moments(optimizer: Any) -> Iterable[Tensor]:
    for state in optimizer.state.values():
        yield from (value for name, value in state.items() if name != "step")


class Parking:
    """Memory of a contender between its turns: none."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        self._parked: list[tuple[torch.UntypedStorage, int, Tensor]] = []

    def park(self) -> None:
        """Free the storages of what lasts; the tensors stay, without memory."""
        found = {tensor.untyped_storage().data_ptr(): tensor for tensor in self._contender.lasting()}
        for tensor in found.values():
            storage = tensor.untyped_storage()
            self._parked.append((storage, storage.nbytes(), tensor))
            storage.resize_(0)

    @torch.no_grad()
    def unpark(self) -> None:
        """Take as much memory again: weights are drawn, norms are ones, all else is zeros."""
        for storage, num_bytes, tensor in self._parked:
            storage.resize_(num_bytes)
            torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage).zero_()
        self._parked.clear()
        for tensor in self._contender.lasting():
            if isinstance(tensor, nn.Parameter):
                tensor.normal_(0, 0.02) if tensor.dim() > 1 else tensor.fill_(1.0)
