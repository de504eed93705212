"""A parallel model's weights as dictionaries: whole ones by Hugging Face name, or this rank's own parts.

Parts go by name and place, ``model.layers.0.mlp.up_proj.weight@0,16`` (the first element's index in the whole
tensor), so that those of another rank or plan are refused instead of loaded where they do not belong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron.core.errors import CheckpointError

from ..processes.ranks import all_gather, communication_device, on_rank_zero, rank
from .gather import Shapes, gather_whole
from .pieces import LocalParameter, box, boxes_of, is_finite

Ties = Mapping[str, str]
"""Name of a parameter that is another one → that one's name."""


def whole_state(parameters: Sequence[LocalParameter], ties: Ties) -> dict[str, Tensor]:
    """On rank 0 every whole parameter, float32 on the CPU; {} elsewhere.  Collective."""
    state: dict[str, Tensor] = {}
    gather_whole(parameters, lambda shapes, tensors: state.update(zip(shapes, tensors, strict=True)))
    if state:
        state |= {name: state[original] for name, original in ties.items()}
    return state


def load_whole_state(parameters: Sequence[LocalParameter], state: Mapping[str, Tensor], ties: Ties) -> None:
    """Fill ``parameters`` from rank 0's ``state``, one tensor at a time.  Collective; all or nothing.

    Raises CheckpointError, on all ranks, if names, shapes or kinds of numbers are not the model's.
    """
    held = all_gather({part.name: part.global_shape for part in parameters})
    shapes = {name: shape for shapes_of_rank in held for name, shape in shapes_of_rank.items()}
    on_rank_zero(lambda: _check_whole(state, shapes, ties))
    parts = {part.name: part for part in parameters}
    for name, shape in shapes.items():
        value = torch.empty(shape, device=communication_device())
        if rank() == 0:
            value.copy_(state[name])
        if len(held) > 1:
            dist.broadcast(value, src=0)
        if name in parts:
            for offset, values in boxes_of(parts[name].tensor, parts[name].pieces):
                values.copy_(box(value, offset, values.shape))


def local_state(parameters: Sequence[LocalParameter]) -> dict[str, Tensor]:
    """This rank's parts by name and place: views, which change as training goes on."""
    return {f"{part.name}@{place}": values for part in parameters for place, values in _placed(part)}


def load_local_state(parameters: Sequence[LocalParameter], state: Mapping[str, Tensor]) -> None:
    """Fill ``parameters`` from what ``local_state`` gave on this rank under the same plan; raises CheckpointError."""
    own = local_state(parameters)
    _check(state, {name: tuple(values.shape) for name, values in own.items()}, "this rank's parts under this plan")
    for name, values in own.items():
        values.copy_(state[name])


def _placed(part: LocalParameter) -> Iterator[tuple[str, Tensor]]:
    for offset, values in boxes_of(part.tensor, part.pieces):
        yield ",".join(map(str, offset)), values


def _check_whole(state: Mapping[str, Tensor], shapes: Shapes, ties: Ties) -> None:
    tied = {name: original for name, original in ties.items() if name in state and original in state}
    _check(state, shapes | {name: shapes[original] for name, original in tied.items()}, "the model's")
    for name, original in tied.items():
        if not torch.equal(state[name], state[original]):
            raise CheckpointError(f"{name} must equal {original}, to which the model ties it; give weights of one")


def _check(state: Mapping[str, Tensor], shapes: Shapes, whose: str) -> None:
    """Names and shapes must be those of ``shapes``, no more and no fewer, the values finite and of floats."""
    given = {name: tuple(values.shape) for name, values in state.items()}
    for name in sorted(given.keys() | shapes.keys()):
        if given.get(name) != shapes.get(name):
            raise CheckpointError(
                f"the state dict must hold {whose}, but {name} has shape {_shape(given.get(name))} there and "
                f"{_shape(shapes.get(name))} in the model; load one that state_dict gave for the same model"
            )
        if not state[name].is_floating_point() or state[name].itemsize < 2:
            raise CheckpointError(f"{name} is {state[name].dtype}; give weights in float32, bfloat16 or float16")
        if not bool(torch.isfinite(state[name]).all()):
            raise CheckpointError(f"weights of {name} hold NaN or inf; give sound weights")
        if not is_finite(state[name]):
            raise CheckpointError(f"weights of {name} hold NaN or inf; give sound weights")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
