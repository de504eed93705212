"""How many bytes a microbatch leaves behind, counted on fake tensors: no memory, no GPU.

Takes a unit's shape; gives an ActivationSample.  Knows nothing of time, of processes or of plans.

What is counted is what is alive once the unit's forward has returned and only autograd holds on to it.  Left
out: parameters and their gradients (the cost model knows them from shapes), the unit's output (it is the next
unit's input, and counted there if that keeps it), and tensors that all layers share (rotary tables), which
count once, as fixed bytes of the embedding.  Buffers that a kernel allocates inside itself are not seen.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from galvatron.core.model import ActivationSample, Recompute
from galvatron.internals import FakeTensorMode

from .storages import StorageLog, storage_bytes
from .units import LocalUnit, UnitShape

BATCHES = (2, 3)  # at one sequence some copies become views: GPT-2 with dropout keeps another sum
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Count:
    """Bytes alive between forward and backward, and at the peak of either."""

    saved_bytes: int
    peak_bytes: int


def count_activations(shape: UnitShape, recompute: Recompute) -> ActivationSample:
    """Bytes of one unit as a line over sequences, through the counts at two and at three of them."""
    low, high = (count(shape, recompute, batch) for batch in BATCHES)
    per_sequence = (high.saved_bytes - low.saved_bytes) // (BATCHES[1] - BATCHES[0])
    workspaces = [(c.peak_bytes - c.saved_bytes) / batch for c, batch in zip((low, high), BATCHES, strict=True)]
    shared = _shared_bytes(shape) if shape.name == "embedding" else 0
    return ActivationSample(
        unit=shape.name,
        tp=shape.tp,
        recompute=recompute,
        seq_len=shape.seq_len,
        fixed_bytes=low.saved_bytes - BATCHES[0] * per_sequence + shared,
        bytes_per_sequence=per_sequence,
        workspace_bytes_per_sequence=math.ceil(max(workspaces)),
    )


def count(shape: UnitShape, recompute: Recompute, batch: int, *, fake: bool = True) -> Count:
    """One forward and backward of ``batch`` sequences, on fake or on real CPU tensors."""
    unit = shape.build()
    unit.recompute(recompute)
    mode = FakeTensorMode() if fake else contextlib.nullcontext()
    place = mode.from_tensor if isinstance(mode, FakeTensorMode) else torch.clone
    with mode:
        unit.allocate(shape.dtype, CPU, place)
        tokens, labels = shape.inputs(batch, CPU)
        with StorageLog() as log:
            return _count(log, unit, tokens, labels)


def _count(log: StorageLog, unit: LocalUnit, tokens: Tensor, labels: dict[str, Tensor]) -> Count:
    parameters = list(unit.parameters())
    log.ignore([*parameters, *unit.buffers(), *unit.side_inputs(), tokens])
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: _let_go_of_gradient(log, p))
    # clones, so that inputs count exactly if the unit keeps them
    output = unit(tokens.clone(), **{name: label.clone() for name, label in labels.items()})
    log.ignore([output])
    saved_bytes = log.live_bytes()
    output.backward(torch.ones_like(output))
    return Count(saved_bytes, log.peak_bytes())


def _let_go_of_gradient(log: StorageLog, parameter: Tensor) -> None:
    assert parameter.grad is not None
    log.ignore([parameter.grad])
    parameter.grad = None


def _shared_bytes(shape: UnitShape) -> int:
    """Bytes of the tensors that all layers of a stage share."""
    tensors = replace(shape, name="layer").build().side_inputs()
    return storage_bytes(tensors)
