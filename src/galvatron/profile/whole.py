"""The ends, and the call of a layer, of families whose ends see whole sequences (``parallelize.pipeline.whole``).

Takes a model on meta; gives its stage without layers as a unit, and what the model hands its layers.  The head's unit
is not charged with what comes before the layers: that ran once, for its shapes.

Of several stacks the embedding's unit has what comes before each and what joins it to the next: the model runs up to
the last stack with layers that hand on what they get, each stack entered and left as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from galvatron.core.model import ModelSpec
from galvatron.internals import tree_map_only
from galvatron.models import Family, Reached, arguments_by_name, blank_inputs, chain_of
from galvatron.models.grids import positions_beside_images
from galvatron.parallelize.layers.tensor_parallel import cut_embedding, shrink
from galvatron.parallelize.losses.fused import fuse_loss
from galvatron.parallelize.pipeline.whole import WholeStage
from galvatron.parallelize.processes.collectives import AxisGroup
from galvatron.plan import LayerStrategy

from .local import LocalUnit


class WholeUnit(LocalUnit):
    """An end with the model's inputs of one row, [1, ...], which later stages need for shapes alone.

    ``args``: of a head, what the modules before the layers give, of one row.
    """

    def forward(self, tokens: Tensor, **others: Tensor) -> Tensor:
        """Inputs [B, ...] → hidden states [B, S/tp, H]; or these to a scalar loss."""
        stage = self.inner
        assert isinstance(stage, WholeStage)
        stage.bare.place()
        if stage.is_first:
            first = next(iter(self.kwargs))
            entered: Tensor = stage(None, {first: tokens, **others})
            return entered
        self.rows = len(tokens)
        loss: Tensor = stage(tokens, self.of_rows(self.kwargs), **others)
        return loss

    def place_inputs(self, dtype: torch.dtype, place: Callable[[Tensor], Tensor]) -> None:
        """The same; what the model is given is cast when it is, as in training."""
        super().place_inputs(dtype, place)
        if isinstance(self.inner, WholeStage):
            self.inner.compute_dtype = dtype

    def of_rows(self, of_one: Any) -> Any:
        """What is of one row, of as many as the unit has been given, in no memory; positions may have no rows."""

        def many(row: Tensor) -> Tensor:
            return row.expand(self.rows, *row.shape[1:]) if len(row) == 1 else row

        return tree_map_only(Tensor, many, of_one)

    def learnt_inputs(self) -> list[Tensor]:
        """What other stacks end with."""
        stacks = self.inner.family.stacks if isinstance(self.inner, WholeStage) else ()
        return [value for value in self.side_inputs() if value.is_floating_point()] if len(stacks) > 1 else []


def embedding_unit(
    model: PreTrainedModel, family: Family, spec: ModelSpec, seq_len: int, groups: Sequence[AxisGroup]
) -> LocalUnit:
    """What comes before the layers, and between stacks, until the last one's first has its part of every sequence.

    ``groups``: of tensor parallelism, one a layer.
    """
    chain, end = chain_of(model, family), last_stack(model, family)
    stage = WholeStage(model, family, range(end, end), is_first=True, is_last=False)
    for table in stage.tables:
        cut_embedding(table, spec.embedding.parameters[0], replace(groups[0], filling=None), whole=True)
        table.weight = stage.tables[0].weight
    if end > 0:
        stage.layer(end).forward = partial(_end_joined, stage.layer(end), family.stacks[-1].side, _pooled(stage))
    for index, link in enumerate(chain[: end + 1]):
        if link.is_first:
            stage.enter_from_whole(index, groups[index])
        if link.is_last and index < end:
            stage.leave_whole(index, lambda hidden: hidden, groups[index])
    if (side := family.stacks[-1].side) is not None:
        stage.side_of(LayerStrategy(), groups[0], lambda hidden: hidden).enter(stage.layer(end), side)
    return WholeUnit(stage, stage.first_modules, (), **blank_inputs(model.config, family.task, 1, seq_len))


def head_unit(
    model: PreTrainedModel, family: Family, spec: ModelSpec, seq_len: int, groups: Sequence[AxisGroup]
) -> LocalUnit:
    """What comes after the layers, from a part of every sequence to the loss; ``groups`` as before."""
    end, blank, tp = spec.num_layers, _without_images(model, family, seq_len), groups[-1]
    stage = WholeStage(model, family, range(end, end), is_first=False, is_last=True)
    stage.receive_in(stage.layer(end - 1))
    stage.leave_whole(end - 1, lambda hidden: hidden, tp)
    stage.head_tp = tp
    if family.head is not None:
        shrink(model, tuple(stage.placed(p) for p in spec.head.parameters if p.cut is not None), tp)
        fuse_loss(stage.last_modules[-1], spec.head.parameters[-1], tp, stage.early_gradient)
        stage.end_at_head()
    unit = WholeUnit(stage, (*stage.last_modules, stage.bare), _outputs_before(stage, blank), **blank)
    for index, module in enumerate(stage.first_modules):
        module.forward = partial(_given, unit, index)
    return unit


def _without_images(model: PreTrainedModel, family: Family, seq_len: int) -> dict[str, Tensor]:
    """Inputs of one row; where a tower would see any number of images, what is left for later stages."""
    blank = blank_inputs(model.config, family.task, 1, seq_len)
    if family.tower is None:
        return blank
    return {"input_ids": blank["input_ids"], "position_ids": positions_beside_images(model, blank)}


def last_stack(model: PreTrainedModel, family: Family) -> int:
    """The index of the last stack's first layer."""
    return next(index for index, link in enumerate(chain_of(model, family)) if link.stack == family.stacks[-1])


def call_of_layer(
    model: PreTrainedModel, family: Family, index: int, seq_len: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``model``, which is used up, gives layer ``index`` beside the hidden states, of one row of ``seq_len``."""
    stage = WholeStage(model, family, range(index, index), is_first=False, is_last=False)
    stage.layer(index).forward = _end_with_call
    args, kwargs = _until(lambda: stage(None, _without_images(model, family, seq_len)))
    if len(family.stacks) == 1:
        return args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}
    named = arguments_by_name(stage.layer(index), args, kwargs)
    return (), {name: value for name, value in named.items() if name != "hidden_states"}


def _outputs_before(stage: WholeStage, blank: dict[str, Tensor]) -> tuple[Any, ...]:
    """What the modules before the layers give, in their order; of one row, in no memory."""
    made: dict[int, Any] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, at=index: made.setdefault(at, output))
        for index, module in enumerate(stage.first_modules)
    ]
    first = stage.layer(last_stack(stage.model, stage.family))
    passing, first.forward = first.forward, _end_with_call
    _until(lambda: stage(None, blank))
    first.forward = passing
    for hook in hooks:
        hook.remove()
    return tuple(made.get(index) for index in range(len(stage.first_modules)))  # none of a tower, which is left out


def _given(unit: WholeUnit, index: int, *_: Any, **__: Any) -> Any:
    return unit.of_rows(unit.args[index])


def _pooled(stage: WholeStage) -> list[Tensor]:
    """Where pairs are contrasted, what a tower before the last ends with, [B, D], once it has run; else nothing."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 2:
            found[:] = [output]

    if stage.family.task == "contrast":
        for module in stage.first_modules:
            module.register_forward_hook(note)
    return found


def _end_joined(layer: nn.Module, side: str | None, pooled: list[Tensor], *args: Any, **kwargs: Any) -> NoReturn:
    """End where the last stack begins, with one number that depends on all that goes on from there."""
    given = arguments_by_name(layer, args, kwargs)
    parts = [given[name] for name in ("hidden_states", side) if name is not None] + pooled
    trained = [part for part in parts if part.requires_grad]
    pooled.clear()
    raise Reached(_Join.apply(*trained) if trained else parts[0])


class _Join(torch.autograd.Function):
    """Several tensors → a number whose gradient goes to all of them."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.shapes = [part.shape for part in parts]
        return parts[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.new_ones(shape) for shape in ctx.shapes)


def _until(run: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call at which ``run`` ends."""
    with torch.no_grad():
        call: tuple[tuple[Any, ...], dict[str, Any]] = run()
    return call


def _end_with_call(*args: Any, **kwargs: Any) -> NoReturn:
    raise Reached((args, kwargs))
