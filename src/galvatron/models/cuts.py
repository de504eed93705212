"""Every parameter of a model with its shape, and how tensor parallelism cuts it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from galvatron.core.cuts import are_experts, layer_cuts
from galvatron.core.family import Blocks, Family, Region, Stack
from galvatron.core.lora import adapter_cuts, plain_name
from galvatron.core.model import Cut, ParameterSpec

from .chain import regions_in, score_table
from .lora import base_linear


def layer_parameters(layer: nn.Module, stack: Stack, counts: dict[Blocks, int]) -> tuple[ParameterSpec, ...]:
    """Every parameter of an uncut ``layer`` with its cut, in the module's own order."""
    shapes = {plain_name(name): tuple(p.shape) for name, p in layer.named_parameters()}
    transposed = {name for name, module in layer.named_modules() if isinstance(base_linear(module), Conv1D)}
    cuts = layer_cuts(stack, shapes, counts, transposed)
    adapters = {name: cut for region in regions_in(layer, stack) for name, cut in _adapter_cuts(layer, region, cuts)}
    table = score_table(layer) if stack.biased else None
    shared = None if table is None else f"{table[0]}.weight"
    return tuple(
        ParameterSpec(
            name=name,
            shape=tuple(p.shape),
            cut=adapters.get(name, cuts.get(plain_name(name))),
            experts=are_experts(name, tuple(p.shape)),
            shared=name == shared,
            trainable=p.requires_grad,
        )
        for name, p in layer.named_parameters()
    )


def embedding_parameters(model: PreTrainedModel, family: Family) -> Iterator[ParameterSpec]:
    """The table of the vocabulary first, if there is one."""
    names, table = first_names(model), None
    if family.embedding is not None:
        table = model.get_submodule(family.embedding).get_parameter("weight")
        yield _vocabulary_cut(names[table], table)
    before = dict.fromkeys(p for name in family.before for p in model.get_submodule(name).parameters())
    yield from (_whole(names[p], p) for p in before if p is not table)


def head_parameters(model: PreTrainedModel, family: Family) -> Iterator[ParameterSpec]:
    """The projection to the vocabulary last, if there is one."""
    names = first_names(model)
    after = family.after if family.norm is None else (family.norm,)
    yield from (_whole(names[p], p) for name in after for p in model.get_submodule(name).parameters())
    yield from (_whole(name, model.get_parameter(name)) for name in family.bare)
    unused = (_whole(name, model.get_parameter(name)) for name in family.unused)
    yield from (parameter.model_copy(update={"trainable": False}) for parameter in unused)
    if family.head is None:
        return
    head = model.get_submodule(family.head)
    if getattr(head, "bias", None) is not None:
        yield _vocabulary_cut(names[head.get_parameter("bias")], head.get_parameter("bias"))
    yield _vocabulary_cut(f"{family.head}.weight", head.get_parameter("weight"))


def first_names(model: PreTrainedModel) -> dict[nn.Parameter, str]:
    """What the model calls its parameters: tied ones by the first of their names."""
    return {parameter: name for name, parameter in model.named_parameters()}


def weight_sizes(linear: nn.Module) -> tuple[int, int]:
    """(input size, output size) of an nn.Linear or of the transposed Conv1D that GPT-2 uses, adapters or not."""
    linear = base_linear(linear)
    rows, columns = linear.weight.shape  # type: ignore[misc]
    return (int(rows), int(columns)) if isinstance(linear, Conv1D) else (int(columns), int(rows))


def _adapter_cuts(layer: nn.Module, region: Region, cuts: Mapping[str, Cut]) -> Iterator[tuple[str, Cut]]:
    """Of the adapters around a region's linears."""
    for name in (*region.columns, region.row):
        linear, of_weight = layer.get_submodule(name), cuts[f"{name}.weight"]
        for letter, own in zip("AB", adapter_cuts(of_weight, is_row=name == region.row), strict=True):
            if own is not None:
                for key in getattr(linear, f"lora_{letter}", ()):
                    yield f"{name}.lora_{letter}.{key}.weight", own


def _whole(name: str, value: nn.Parameter) -> ParameterSpec:
    return ParameterSpec(name=name, shape=tuple(value.shape), trainable=value.requires_grad)


def _vocabulary_cut(name: str, value: nn.Parameter) -> ParameterSpec:
    cut = Cut(dim=0, segments=(value.shape[0],), uneven="ceil")
    return ParameterSpec(name=name, shape=tuple(value.shape), cut=cut, trainable=value.requires_grad)
