"""The ends, and the call of a layer, of families whose ends see whole sequences (``parallelize.pipeline.whole``).

Takes a model on meta; gives its stage without layers as a unit, and what the model hands its layers.  The head's unit
is not charged with what comes before the layers: that ran once, for its shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from galvatron.core.model import ModelSpec
from galvatron.models import Family, Reached, blank_inputs
from galvatron.parallelize.layers.tensor_parallel import cut_embedding, shrink
from galvatron.parallelize.losses.fused import fuse_loss
from galvatron.parallelize.pipeline.whole import WholeStage
from galvatron.parallelize.processes.collectives import AxisGroup

from .local import LocalUnit


class WholeUnit(LocalUnit):
    """An end with its inputs of one row, [1, ...], which later stages need for shapes alone."""

    def forward(self, tokens: Tensor, **labels: Tensor) -> Tensor:
        """Inputs [B, ...] → hidden states [B, S/tp, H]; or these to a scalar loss."""
        (name, row), *others = self.kwargs.items()
        assert not others
        is_first = isinstance(self.inner, WholeStage) and self.inner.is_first
        received = None if is_first else tokens
        output: Tensor = self.inner(
            received, {name: tokens if is_first else row.expand(len(tokens), *row.shape[1:])}, **labels
        )
        return output


def embedding_unit(model: PreTrainedModel, family: Family, spec: ModelSpec, seq_len: int, tp: AxisGroup) -> LocalUnit:
    """What comes before the layers, until the first of them has its part of every sequence."""
    stage = WholeStage(model, family, range(0), is_first=True, is_last=False)
    for table in stage.tables:
        cut_embedding(table, spec.embedding.parameters[0], tp, whole=True)
    stage.enter_from_whole(0, tp)
    return WholeUnit(stage, stage.first_modules, (), **blank_inputs(model.config, family.task, 1, seq_len))


def head_unit(model: PreTrainedModel, family: Family, spec: ModelSpec, seq_len: int, tp: AxisGroup) -> LocalUnit:
    """What comes after the layers, from a part of every sequence to the loss."""
    end, blank = spec.num_layers, blank_inputs(model.config, family.task, 1, seq_len)
    stage = WholeStage(model, family, range(end, end), is_first=False, is_last=True)
    stage.receive_in(stage.layer(end - 1))
    stage.leave_whole(end - 1, lambda hidden: hidden, tp)
    stage.head_tp = tp
    if family.head is not None:
        shrink(model, tuple(stage.placed(p) for p in spec.head.parameters if p.cut is not None), tp)
        fuse_loss(stage.last_modules[-1], spec.head.parameters[-1], tp, stage.early_gradient)
        stage.end_at_head()
    unit = WholeUnit(stage, stage.last_modules, _outputs_before(stage, blank), **blank)
    for index, module in enumerate(stage.first_modules):
        module.forward = partial(_given, unit, index)
    return unit


def call_of_layer(
    model: PreTrainedModel, family: Family, index: int, seq_len: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``model``, which is used up, gives layer ``index`` beside the hidden states, of one row of ``seq_len``."""
    stage = WholeStage(model, family, range(index, index), is_first=False, is_last=False)
    stage.layer(index).forward = _end_with_call
    args, kwargs = _until(lambda: stage(None, blank_inputs(model.config, family.task, 1, seq_len)))
    return args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _outputs_before(stage: WholeStage, blank: dict[str, Tensor]) -> tuple[Any, ...]:
    """What the modules before the layers give, in their order; of one row, in no memory."""
    made: dict[int, Any] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, at=index: made.setdefault(at, output))
        for index, module in enumerate(stage.first_modules)
    ]
    first = stage.layer(0)
    passing, first.forward = first.forward, _end_with_call
    _until(lambda: stage(None, blank))
    first.forward = passing
    for hook in hooks:
        hook.remove()
    return tuple(made[index] for index in range(len(stage.first_modules)))


def _given(unit: LocalUnit, index: int, *_: Any, **__: Any) -> Any:
    return unit.args[index]


def _until(run: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call at which ``run`` ends."""
    with torch.no_grad():
        call: tuple[tuple[Any, ...], dict[str, Any]] = run()
    return call


def _end_with_call(*args: Any, **kwargs: Any) -> NoReturn:
    raise Reached((args, kwargs))
