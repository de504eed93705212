"""How many bytes a microbatch leaves behind, counted on fake tensors: no memory, no GPU.

Takes a unit's shape; gives an ActivationSample.  Knows nothing of time, of processes or of plans.

What is counted is what is alive once the unit's forward has returned and only autograd holds on to it.  Left
out: parameters and their gradients, also those made in the forward pass (the cost model knows them from shapes),
the unit's output (it is the next unit's input, and counted there if that keeps it), and tensors that all layers
share (rotary tables), which count once, as fixed bytes of the embedding.  Buffers that a kernel allocates inside
itself are not seen.

Compiled layers are counted by the graphs that the compiler makes, run operation by operation: exact in what is kept,
an upper bound of the peak, for a device's code fuses operations and never holds what is between them.  Graphs are of
small operations (an activation's gradient is a dozen, in float32), so that the same layer may peak lower when it is not
compiled; then that bounds the fused code too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise, starmap
from typing import Any

import torch
from torch import Tensor, nn

from galvatron.core.model import Recompute
from galvatron.core.model_profile import ActivationSample
from galvatron.internals import FakeTensorMode, without_value_checks
from galvatron.models.grids import usual_sides
from galvatron.parallelize.losses.fused import chunk_tokens
from galvatron.parallelize.pipeline.standins import hidden_of
from galvatron.parallelize.pipeline.whole import WholeStage

from .local import LocalUnit
from .storages import StorageLog, storage_bytes
from .units import UnitShape

BATCHES = (2, 3)  # at one sequence some copies become views: GPT-2 with dropout keeps another sum
TOWER_TOKENS = 72
"""Of a text, of which an image takes half."""
CPU = torch.device("cpu")
GRAPHS_ALONE = "aot_eager_decomp_partition"  # the compiler without the code that it makes of graphs


@dataclass(frozen=True)
class Count:
    """Bytes alive between forward and backward, and at the peak of either.

    ``joined_bytes``: what of an embedding's saved ones is of the ways between stacks; ``expert_bytes``: what of a
    layer's is made within experts.
    """

    saved_bytes: int
    peak_bytes: int
    joined_bytes: tuple[int, ...] = ()
    expert_bytes: int = 0

    @property
    def workspace_bytes(self) -> int:
        """What is alive at the peak beyond what is saved."""
        return self.peak_bytes - self.saved_bytes


def count_activations(shape: UnitShape, recompute: Recompute) -> ActivationSample:
    """Bytes of one unit as a line over sequences, through the counts at two and at three of them."""
    if shape.is_compiled:
        return _of_graph(shape, recompute)
    if shape.name == "embedding" and shape.has_tower:
        return _of_tower(shape)
    low, high = (count(shape, recompute, batch) for batch in BATCHES)
    fixed, per_sequence = _saved_line(low.saved_bytes, high.saved_bytes)
    shared = _shared_bytes(shape) if shape.name == "embedding" else 0
    sample = ActivationSample(
        unit=shape.name,
        tp=shape.tp,
        recompute=recompute,
        seq_len=shape.seq_len,
        fixed_bytes=fixed + shared,
        bytes_per_sequence=per_sequence,
        workspace_bytes_per_sequence=math.ceil(
            max(c.workspace_bytes / n for c, n in zip((low, high), BATCHES, strict=True))
        ),
        expert_bytes_per_sequence=high.expert_bytes - low.expert_bytes,
        joints=tuple(starmap(_saved_line, zip(low.joined_bytes, high.joined_bytes, strict=True))),
    )
    return sample.model_copy(update=_chunked_workspace(shape)) if shape.name == "head" else sample


def _of_tower(shape: UnitShape) -> ActivationSample:
    """An embedding's bytes with those of the tower within, which are proportional to an image's tokens.

    Counted beside short texts on real tensors: what a tower runs follows from the values of grids.
    """
    short = replace(shape, seq_len=min(shape.seq_len, TOWER_TOKENS))
    low, high = (count(short, "none", batch, fake=False) for batch in BATCHES)
    tokens, counted = (math.prod(usual_sides(length)[0]) for length in (shape.seq_len, short.seq_len))
    per_sequence = (high.saved_bytes - low.saved_bytes) // (BATCHES[1] - BATCHES[0])
    workspace = max(c.workspace_bytes / n for c, n in zip((low, high), BATCHES, strict=True))
    return ActivationSample(
        unit=shape.name,
        tp=shape.tp,
        recompute="none",
        seq_len=shape.seq_len,
        fixed_bytes=max(low.saved_bytes - BATCHES[0] * per_sequence, 0) + _shared_bytes(shape),
        bytes_per_sequence=math.ceil(per_sequence * tokens / counted),
        workspace_bytes_per_sequence=math.ceil(workspace * tokens / counted),
    )


def _saved_line(low: int, high: int) -> tuple[int, int]:
    """(fixed, a sequence) of the line through two batches; pairs that are contrasted keep more than one."""
    per_sequence = (high - low) // (BATCHES[1] - BATCHES[0])
    return max(low - BATCHES[0] * per_sequence, 0), per_sequence


def _of_graph(shape: UnitShape, recompute: Recompute) -> ActivationSample:
    """A compiled layer's bytes, proportional to the batch; counted once, for it takes seconds to compile."""
    batch = BATCHES[0]
    counted = count(shape, recompute, batch)
    peak_bytes = min(counted.peak_bytes, count(replace(shape, compiled=False), recompute, batch).peak_bytes)
    return ActivationSample(
        unit=shape.name,
        tp=shape.tp,
        recompute=recompute,
        seq_len=shape.seq_len,
        fixed_bytes=0,
        bytes_per_sequence=math.ceil(counted.saved_bytes / batch),
        workspace_bytes_per_sequence=math.ceil((peak_bytes - counted.saved_bytes) / batch),
    )


def _chunked_workspace(shape: UnitShape) -> dict[str, Any]:
    """The head's workspace: a line for a few sequences, and a flatter one from where they are more than a chunk.

    A head without a vocabulary knows no chunks.
    """
    projection = shape.spec.head.parameters[-1]
    if projection.cut is None:
        fixed, per_sequence = _line(shape, *BATCHES)
        return {"workspace_fixed_bytes": fixed, "workspace_bytes_per_sequence": per_sequence}
    rows = projection.local_shape(shape.tp)[0]
    chunk = chunk_tokens(rows, shape.dtype) / shape.seq_len
    many = max(math.ceil(chunk), BATCHES[0])
    beyond, first = _line(shape, many, many + 1), _line(shape, 1, 2) if chunk >= BATCHES[0] else None
    fixed, per_sequence = first or beyond
    return {
        "workspace_fixed_bytes": fixed,
        "workspace_bytes_per_sequence": per_sequence,
        "workspace_beyond": beyond if first else None,
    }


def _line(shape: UnitShape, first: int, last: int) -> tuple[int, int]:
    """(fixed bytes, bytes per sequence) of the line through the workspaces of two batches."""
    low, high = (count(shape, "none", batch).workspace_bytes for batch in (first, last))
    per_sequence = math.ceil((high - low) / (last - first))
    return max(low - first * per_sequence, 0), per_sequence


def count(shape: UnitShape, recompute: Recompute, batch: int, *, fake: bool = True) -> Count:
    """One forward and backward of ``batch`` sequences, on fake or on real CPU tensors."""
    return counts(shape, [recompute], batch, fake=fake)[0]


def counts(shape: UnitShape, levels: Iterable[Recompute], batch: int, *, fake: bool = True) -> list[Count]:
    """The same at one level of recompute after the other, by one unit."""
    unit, found = shape.build(GRAPHS_ALONE), []
    if unit.experts is not None and shape.dtype != torch.bfloat16:
        fake = False  # grouped products know no others on fake tensors (torch 2.13)
    # graphs may hold the state of a random generator
    mode = FakeTensorMode(allow_non_fake_inputs=shape.is_compiled) if fake else contextlib.nullcontext()
    place = mode.from_tensor if isinstance(mode, FakeTensorMode) else torch.clone
    with mode, without_value_checks():
        unit.allocate(shape.dtype, CPU, place)
        tokens, labels = shape.inputs(batch, CPU)
        for level in levels:
            unit.recompute(level)
            if shape.is_compiled:
                _run_once(unit, tokens, labels)
            with StorageLog() as log:
                found.append(_count(log, unit, tokens, labels))
    return found


def _run_once(unit: LocalUnit, tokens: Tensor, labels: dict[str, Tensor]) -> None:
    """Let the graphs be made."""
    output = unit(tokens, **labels)
    if output.requires_grad:
        output.backward(torch.ones_like(output))
        unit.zero_grad()


def _count(log: StorageLog, unit: LocalUnit, tokens: Tensor, labels: dict[str, Tensor]) -> Count:
    parameters = list(unit.parameters())
    log.ignore([*parameters, *unit.buffers(), *unit.side_inputs(), tokens, *labels.values()])
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: _let_go_of_gradient(log, p))
        for p in parameters
        if p.requires_grad
    ]
    # clones, so that inputs count exactly if the unit keeps them; a batch of whole ends is there for all of a step, and
    # another stack's states are there for all layers
    entered: dict[nn.Module, frozenset[int]] = {}  # what has been made when a stack is entered, but for its input

    def note(layer: nn.Module, args: Any, kwargs: Any) -> None:
        entered.setdefault(layer, log.seen(hidden_of(args, kwargs)))

    hooks += [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in _first_layers(unit)]
    before: list[frozenset[int]] = []  # and when experts are entered and left
    within: set[int] = set()
    if unit.experts is not None:
        hooks.append(unit.experts.register_forward_pre_hook(lambda *_: before.append(log.seen())))
        hooks.append(unit.experts.register_forward_hook(lambda *_: within.update(log.seen() - before.pop())))
    is_batch = isinstance(unit.inner, WholeStage) and unit.inner.is_first
    output = unit(
        tokens if is_batch else tokens.clone(),
        **{name: v if is_batch or v.is_floating_point() else v.clone() for name, v in labels.items()},
    )  # nothing here may hold on to a clone
    log.ignore([output, *unit.early_gradients()])
    between = log.moment()
    if output.requires_grad:  # not where nothing up to here is trainable
        output.backward(torch.ones_like(output))
    for hook in hooks:
        hook.remove()
    saved = log.live_bytes(between)
    parts = [*(log.live_bytes(between, seen) for seen in entered.values()), saved]
    of_experts = log.live_bytes(between, frozenset(within))
    return Count(saved, log.peak_bytes(), tuple(b - a for a, b in pairwise(parts)), of_experts)


def _first_layers(unit: LocalUnit) -> list[nn.Module]:
    """Of every stack that an embedding joins to another."""
    stage = unit.inner
    if not isinstance(stage, WholeStage) or not stage.is_first:
        return []
    starts = [0, *(at for at in range(1, len(stage.chain)) if stage.chain[at].stack is not stage.chain[at - 1].stack)]
    return [stage.layer(at) for at in starts[:-1]]


def _let_go_of_gradient(log: StorageLog, parameter: Tensor) -> None:
    assert parameter.grad is not None
    log.ignore([parameter.grad])
    parameter.grad = None


def _shared_bytes(shape: UnitShape) -> int:
    """Bytes of the tensors that all layers of a stage share, of all stacks."""
    return storage_bytes([t for name in shape.first_kinds() for t in replace(shape, name=name).build().side_inputs()])
