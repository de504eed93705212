"""Part ``modes``: every way to run on one device against plain transformers in float32 on one CPU process.

recompute x compiled x loss (fused, or a function of one's own) x precision: the error of the loss, and of the worst
gradient as |found - true| / |true| (Euclidean norms of a parameter's whole gradient).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import get_args

import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from galvatron.core.errors import GalvatronError
from galvatron.core.model import RECOMPUTES, Precision, Recompute
from galvatron.parallelize import ParallelModel, World, init_world, parallelize
from galvatron.parallelize.layers import compile
from galvatron.parallelize.sharding.fsdp import DTYPES
from galvatron.testing.models import tiny_model
from galvatron.testing.reference import Recipe, Reference, train_reference

from .children import Child, Clock, Row, reason_of
from .runs import one_device_plan
from .sizes import Device, Work

CONFIG = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
WORK = Work("small", global_batch_size=4, seq_len=64, micro_batch_size=2)
OWN_LOSS: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda logits, labels: F.cross_entropy(  # noqa: E731
    logits, labels, reduction="none"
)
LOSSES = {"fused": None, "own": OWN_LOSS}
IN_FLOAT32 = 1e-5
"""As in the parity certificate, for both."""
ROUNDINGS = {"loss": 0.5, "gradient": 16.0}
"""What a precision below float32 may be off, in its own epsilons.  [Empirical: November 2026, CPU: bf16 0.03 and 8]"""
OVERFLOWS = 16
"""Steps that a dynamic loss scale may take to come down to where nothing overflows."""
WRONG = 1e9
"""The error of what is missing or no number."""
GRAPHS_ALONE = "aot_eager_decomp_partition"  # on a CPU: making code of graphs takes half a minute each


def run(device: Device, clock: Clock) -> Iterator[Row]:
    with Child(measure, device, clock, start=device.start) as child:
        yield from child.rows(clock)


def tolerance(kind: str, precision: Precision) -> float:
    if precision == "fp32":
        return IN_FLOAT32
    return ROUNDINGS[kind] * torch.finfo(DTYPES[precision]).eps


def measure(connection: Connection, device: Device, clock: Clock) -> None:
    """Sends a row a mode; modes that the seconds do not reach are sent as left out."""
    if not device.is_gpu:
        torch.set_num_threads(1)
        compile.BACKEND = GRAPHS_ALONE
    world = init_world(device.type)
    reference = train_reference(
        tiny_model(LlamaConfig(**CONFIG)), WORK.global_batch_size, WORK.seq_len, Recipe(num_steps=1)
    )
    # eager ones first, for they are cheap, then what is trained in most
    precisions = sorted(get_args(Precision), key=lambda precision: precision != "bf16")
    for compiled, precision, recompute in itertools.product((False, True), precisions, RECOMPUTES):
        if compiled and not device.is_gpu and (precision != "fp32" or recompute not in ("none", "full")):
            continue  # each takes seconds
        mode = {"precision": precision, "compiled": compiled, "recompute": recompute}
        if clock.left_s <= 0:
            connection.send({**mode, "skipped": "no time left"})
            continue
        for row in _rows(reference, world, precision, recompute, compiled):
            connection.send({**mode, **row})


def _rows(
    reference: Reference, world: World, precision: Precision, recompute: Recompute, compiled: bool
) -> Iterator[Row]:
    """The mode under every loss."""
    try:
        plan = one_device_plan(WORK, WORK.micro_batch_size, precision, [recompute] * CONFIG["num_hidden_layers"])
        model = parallelize(reference.model(), plan, world=world, compile=compiled)
        for loss in LOSSES:
            yield {"loss": loss, **_compared(model, reference, loss, precision)}
    except (GalvatronError, ValueError) as error:  # what this device or this release does not offer
        yield {"skipped": reason_of(error)}


def _compared(model: ParallelModel, reference: Reference, loss: str, precision: Precision) -> Row:
    (step,) = reference.steps
    for _ in range(OVERFLOWS):
        found = float(model.train_step(step.inputs["input_ids"], step.labels, loss_fn=LOSSES[loss]))
        model.clip_grad_norm_(None)  # gradients are themselves then, whatever a precision multiplies them by
        if any(p.tensor.grad is not None for p in model.local_parameters):
            break
    errors = [_error(p.tensor.grad, step.gradients[p.name]) for p in model.local_parameters]
    loss_error, gradient_error = _finite(abs(found / step.loss - 1)), max(errors)
    holds = loss_error <= tolerance("loss", precision) and gradient_error <= tolerance("gradient", precision)
    return {"loss_error": loss_error, "gradient_error": gradient_error, "holds": holds}


def _error(gradient: torch.Tensor | None, truth: torch.Tensor) -> float:
    if gradient is None:
        return WRONG
    return _finite(float((gradient.float().cpu() - truth).norm() / truth.norm()))


def _finite(error: float) -> float:
    return error if math.isfinite(error) else WRONG
