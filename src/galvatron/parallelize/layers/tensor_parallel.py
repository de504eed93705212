"""Tensor parallelism with Megatron sequence parallelism, at the seams of unmodified modules.

Between regions hidden states are cut along the sequence, [B, S/tp, H].  A region (attention, MLP) gathers
its input once; column-cut linears just have fewer outputs; a row-cut linear reduce-scatters its product and
then adds its bias (Shoeybi et al. 2019; Korthikanti et al. 2022).  Module classes stay Hugging Face's:
parameters are replaced by shards and ``forward`` is replaced on the instance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from galvatron.core.errors import ConfigError
from galvatron.core.model import ParameterSpec, UnitSpec
from galvatron.internals import multiplies_in_float8
from galvatron.models import Experts, Region
from galvatron.models.lora import base_linear
from galvatron.plan.filling import Filling

from ..processes.collectives import (
    AxisGroup,
    gather_sequence,
    of_spans,
    own_part,
    reduce_scatter_sequence,
    whole_sequence,
)
from ..processes.rows import ExpertGroups
from .adapters import linears_of, run_adapters
from .experts import HERE, Beside, share_experts
from .forward import wrap_forward
from .heads import count_own_heads, linears_of_region, own_heads_of_inputs
from .later import Tap, product, tapped
from .wide_norms import wide_norm_forward


def cut_layer(
    layer: nn.Module,
    regions: tuple[Region, ...],
    unit: UnitSpec,
    tp: AxisGroup,
    experts: Experts | None = None,
    dealt: ExpertGroups = HERE,
) -> None:
    """Cut ``layer`` (parameters on any device; their values are not kept) for one rank of ``tp``, and of ``dealt``."""
    run_adapters(layer)
    if tp.size == dealt.ep.size == 1:
        return
    shrink(layer, unit.parameters, tp, dealt.ep.size)
    in_windows = any(region.windows for region in regions)
    for region in regions if tp.size > 1 else ():
        for name in region.columns:
            for path, linear in linears_of(layer, name):
                if _weight(unit, path).cut is not None:  # the adapter's A takes whole inputs
                    _keep_own_outputs(linear, _weight(unit, path), tp)
        for name in region.wide_norms:
            norm = layer.get_submodule(name)
            norm.forward = wide_norm_forward(norm, tp)
        rows = _Rows()
        if region.flat:
            wrap_forward(layer, rows.noting)
        for name in region.gathering:
            module = layer.get_submodule(name)
            if region.row_blocks == "heads":
                count_own_heads(module, linears_of_region(layer, region), tp)
            if region.head_inputs:
                heads = _weight(unit, region.row).cut
                assert heads is not None
                wrap_forward(module, partial(own_heads_of_inputs, region.head_inputs, heads.blocks, tp))
            if not in_windows:
                module.forward = _gathered(module.forward, tp, rows if region.flat else None, region.sides)
        linear = layer.get_submodule(region.row)
        reduce = partial(_summed, tp) if in_windows else partial(_scattered, tp, flat=region.flat)
        linear.forward = _row_forward(linear, reduce)
    if experts is not None:  # last: what runs beside them is cut by now
        beside = _beside(layer, experts) if dealt.ep.size > 1 else None
        share_experts(layer.get_submodule(experts.module), tp, dealt, experts.cuts, beside)
    if in_windows and tp.size > 1:
        wrap_forward(layer, partial(_see_whole, tp))


def _see_whole(tp: AxisGroup, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a layer of windows on whole sequences; its gradients within are this rank's part of a sum over ranks."""
    output = forward(gather_sequence(hidden, tp), *args, **kwargs)
    if isinstance(output, tuple):
        return (own_part(output[0], tp), *output[1:])
    return own_part(output, tp)


def _beside(layer: nn.Module, experts: Experts) -> Beside | None:
    if experts.beside is None:
        return None
    block = layer.get_submodule(experts.module.rpartition(".")[0])
    return Beside(block, layer.get_submodule(experts.beside))


def tap_linears(layer: nn.Module, regions: tuple[Region, ...], unit: UnitSpec, tp: AxisGroup) -> tuple[Tap, ...]:
    """Give the trained linears of ``layer`` taps (``layers.later``); before it is cut."""
    taps = []
    for region in regions:
        for name in (*region.columns, region.row):
            for path, linear in linears_of(layer, name):
                parameter = _weight(unit, path)
                if parameter.trainable:
                    _check_replaceable(linear, nn.Linear, Conv1D)
                    tapped(linear)
                    is_block = tp.size > 1 and parameter.cut is not None and parameter.cut.is_whole(tp.size)
                    taps.append(Tap(linear, _own_block(parameter, tp) if is_block else None))
    return tuple(taps)


def cut_embedding(embedding: nn.Module, parameter: ParameterSpec, tp: AxisGroup, *, whole: bool = False) -> None:
    """Cut an embedding along the vocabulary: ids [B, S] → hidden [B, S/tp, H]; the padding row gets no gradient.

    ``whole``: the ranks end with all of the sequence, [B, S, H].  What else its own forward does to the looked-up rows
    (a scale) it does to this rank's.
    """
    if tp.size == 1:
        return
    embedding.weight = _shrunk(embedding.weight, parameter, tp)
    start, stop = vocabulary_range(parameter, tp)
    padding: Any = embedding.padding_idx
    own_padding = padding - start if padding is not None and start <= padding < stop else None
    embedding.padding_idx = own_padding  # type: ignore[assignment]
    look_up = embedding.forward

    def forward(ids_BS: Tensor) -> Tensor:
        own = (ids_BS >= start) & (ids_BS < stop)
        partial = look_up(torch.where(own, ids_BS - start, 0))
        own_tokens = reduce_scatter_sequence(partial * own.unsqueeze(-1), tp)
        return whole_sequence(own_tokens, tp) if whole else own_tokens

    embedding.forward = forward


def cut_positions(embedding: nn.Module, spans: tuple[range, ...]) -> None:
    """Let a position embedding look up this rank's spans of the positions [1, S] that it is given."""

    def own(whole: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs:
            return whole(of_spans(args[0], spans))
        return of_spans(whole(*args, **kwargs).transpose(1, 2), spans).transpose(1, 2)  # [1, S, H]

    wrap_forward(embedding, own)


def shrink(module: nn.Module, parameters: tuple[ParameterSpec, ...], tp: AxisGroup, ep: int = 1) -> None:
    """Replace every cut parameter of ``module`` by an uninitialised one of this rank's shape."""
    for parameter in parameters:
        owner, _, name = parameter.name.rpartition(".")
        target = module.get_submodule(owner)
        setattr(target, name, _shrunk(getattr(target, name), parameter, tp, ep))


def vocabulary_range(parameter: ParameterSpec, tp: AxisGroup) -> tuple[int, int]:
    """The (start, stop) vocabulary rows of this rank."""
    if parameter.cut is None:
        return 0, parameter.shape[0]
    return parameter.cut.ranges(parameter.shape[0], tp.size, tp.rank)[0]


def _check_replaceable(module: nn.Module, *classes: type[nn.Module]) -> None:
    """Refuse to replace the forward of a class whose arithmetic ours does not repeat (scaled lookups, adapters).

    A type's own linear is in its twin too, whose gradients say whether ours does.
    """
    is_own = isinstance(module, nn.Linear) and type(module).__module__.startswith("transformers.models.")
    if type(module) not in classes and not is_own and not multiplies_in_float8(module):
        known = " or ".join(known.__name__ for known in classes)
        raise ConfigError(
            f"tensor parallelism replaces the forward of {known} alone, got {type(module).__name__}; use tp=1 for it"
        )


def _shrunk(value: Any, parameter: ParameterSpec, tp: AxisGroup, ep: int = 1) -> nn.Parameter:
    shape = parameter.local_shape(tp.size, tp.rank, ep)
    if shape == tuple(value.shape):
        return value
    return nn.Parameter(value.detach().new_empty(shape), requires_grad=value.requires_grad)


def _weight(unit: UnitSpec, linear: str) -> ParameterSpec:
    return next(p for p in unit.parameters if p.name == f"{linear}.weight")


class _Rows:
    """How many rows the batch has that a layer is running, for the parts of it that see tokens in one dim."""

    number = 1

    def noting(self, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Note the rows, then run."""
        self.number = hidden.shape[0]
        return forward(hidden, *args, **kwargs)


def _gathered(
    forward: Callable[..., Any], tp: AxisGroup, rows: _Rows | None, sides: tuple[str, ...]
) -> Callable[..., Any]:
    """``forward`` with hidden states (first argument, or ``hidden_states``) and ``sides`` gathered."""

    def whole(hidden: Tensor) -> Tensor:
        return gather_sequence(hidden if rows is None else hidden.unflatten(0, (rows.number, -1)), tp)

    def gathered(*args: Any, **kwargs: Any) -> Any:
        kwargs |= {name: whole(kwargs[name]) for name in sides if kwargs.get(name) is not None}
        if args:
            return forward(whole(args[0]), *args[1:], **kwargs)
        return forward(**{**kwargs, "hidden_states": whole(kwargs["hidden_states"])})

    return gathered


def _keep_own_outputs(linear: nn.Module, parameter: ParameterSpec, tp: AxisGroup) -> None:
    """Make a column-cut ``linear`` produce this rank's outputs."""
    assert parameter.cut is not None
    if parameter.cut.is_whole(tp.size):
        linear.forward = _block_forward(linear, parameter, tp)
    elif isinstance(linear, Conv1D):
        linear.nf = linear.weight.shape[1]  # Conv1D views its output by this size


def _block_forward(linear: nn.Module, parameter: ParameterSpec, tp: AxisGroup) -> Callable[[Tensor], Tensor]:
    """Forward of a linear kept whole whose rank needs one block alone (kv heads fewer than tp)."""
    _check_replaceable(linear, nn.Linear)
    start, width = _own_block(parameter, tp)

    def forward(x: Tensor) -> Tensor:
        bias = None if linear.bias is None else linear.bias.narrow(0, start, width)  # type: ignore[operator]
        return product(linear, x, linear.weight.narrow(0, start, width), bias)  # type: ignore[operator]

    return forward


def _own_block(parameter: ParameterSpec, tp: AxisGroup) -> tuple[int, int]:
    """(start, number) of the rows that a rank uses of a weight that is kept whole."""
    assert parameter.cut is not None
    width = parameter.shape[0] // parameter.cut.blocks
    return tp.rank * parameter.cut.blocks // tp.size * width, width


def _row_forward(linear: nn.Module, reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Forward of a row-cut linear: partial product, its sum over ranks, then the bias.

    What adapters around it add is partial as its own product is, so that one sum is of both.
    """
    base = base_linear(linear)
    _check_replaceable(base, nn.Linear, Conv1D)

    def multiply(x: Tensor) -> Tensor:
        return product(base, x, base.weight)  # type: ignore[arg-type]

    partial = multiply
    if base is not linear:
        base.forward, partial = multiply, linear.forward

    def forward(x: Tensor) -> Tensor:
        out = reduce(partial(x))
        return out if base.bias is None else out + base.bias  # type: ignore[operator]

    return forward


def _scattered(tp: AxisGroup, x_BS: Tensor, *, flat: bool) -> Tensor:
    """Partial sums → their sum, cut along the sequence."""
    out = reduce_scatter_sequence(x_BS, tp)
    return out.flatten(0, 1) if flat else out


def _summed(tp: AxisGroup, x: Tensor) -> Tensor:
    """Partial sums [..., H] → their sum on all ranks, whose backward is a sum too; as one sequence of tokens."""
    tokens = x.flatten(0, -2).unsqueeze(0)
    axes = replace(tp, filling=Filling.up(tokens.shape[1], tp.size))
    return gather_sequence(reduce_scatter_sequence(tokens, axes), axes).view(x.shape)
