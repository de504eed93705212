"""Every parameter of a model with its shape, and how tensor parallelism cuts it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from galvatron.core.family import Blocks, Experts, Family, Region, Stack
from galvatron.core.lora import adapter_cuts
from galvatron.core.model import Cut, ParameterSpec

from .chain import experts_in, regions_in, score_table
from .lora import base_linear


def layer_parameters(layer: nn.Module, stack: Stack, counts: dict[Blocks, int]) -> tuple[ParameterSpec, ...]:
    """Every parameter of an uncut ``layer`` with its cut, in the module's own order."""
    cuts = {name: cut for region in regions_in(layer, stack) for name, cut in _cuts(layer, region, counts)}
    if (experts := experts_in(layer, stack)) is not None:
        cuts |= _expert_cuts(layer, experts)
    table = score_table(layer) if stack.biased else None
    shared = None if table is None else f"{table[0]}.weight"
    return tuple(
        ParameterSpec(
            name=name,
            shape=tuple(p.shape),
            cut=cuts.get(name),
            experts=_are_experts(name, p),
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


def _are_experts(name: str, value: nn.Parameter) -> bool:
    """Batched matrices, or biases beside them, dim 0 of which counts experts."""
    owner = name.rpartition(".")[0]
    return (".experts." in name and value.dim() == 3) or (owner.endswith(".experts") and value.dim() == 2)


def _cuts(layer: nn.Module, region: Region, counts: dict[Blocks, int]) -> Iterator[tuple[str, Cut]]:
    row = base_linear(layer.get_submodule(region.row))
    counts = {**counts, "kv_head": 1, "ffn": weight_sizes(row)[0]}
    for name, blocks in region.columns.items():
        output_dim = 1 if isinstance(base_linear(layer.get_submodule(name)), Conv1D) else 0
        segments = tuple(counts[block] for block in blocks)
        cut = Cut(dim=output_dim, segments=segments, uneven=_uneven(region, blocks))
        yield from _linear_cuts(layer, name, cut, is_row=False)
    for name, block in (*region.wide_norms.items(), *region.by_head.items()):
        for parameter, _ in layer.named_parameters():
            if parameter == name or parameter.startswith(f"{name}."):
                yield parameter, Cut(dim=region.by_head_dims.get(name, 0), segments=(counts[block],))
    row_cut = Cut(dim=0 if isinstance(row, Conv1D) else 1, segments=(counts[region.row_blocks],))
    yield from _linear_cuts(layer, region.row, row_cut, is_row=True)


def _uneven(region: Region, blocks: tuple[Blocks, ...]) -> Literal["refuse", "whole", "shared"]:
    """What becomes of kv heads fewer than tp."""
    if "kv_heads" in (*region.wide_norms.values(), *region.by_head.values()) or region.wide_norms:
        return "refuse"  # a norm over all of them leaves no way to keep them whole
    if "kv_head" in blocks or ("kv_heads" in blocks and len(blocks) > 1):
        return "shared"
    has_queries = any("heads" in others for others in region.columns.values())  # not in the same blocks
    return "whole" if blocks == ("kv_heads",) and has_queries else "refuse"


def _linear_cuts(layer: nn.Module, name: str, cut: Cut, *, is_row: bool) -> Iterator[tuple[str, Cut]]:
    """Of a linear whose weight is cut so, and of the adapters around it."""
    linear = layer.get_submodule(name)
    base = name if base_linear(linear) is linear else f"{name}.base_layer"
    yield f"{base}.weight", cut
    if not is_row:
        yield f"{base}.bias", cut.model_copy(update={"dim": 0})
    for letter, own in zip("AB", adapter_cuts(cut, is_row=is_row), strict=True):
        if own is not None:
            yield from ((f"{name}.lora_{letter}.{key}.weight", own) for key in getattr(linear, f"lora_{letter}", ()))


def _expert_cuts(layer: nn.Module, experts: Experts) -> dict[str, Cut]:
    found = {}
    for name, (dim, segments) in experts.cuts.items():
        width = layer.get_parameter(f"{experts.module}.{name}").shape[dim] // segments
        found[f"{experts.module}.{name}"] = Cut(dim=dim, segments=(width,) * segments)
    return found


def _whole(name: str, value: nn.Parameter) -> ParameterSpec:
    return ParameterSpec(name=name, shape=tuple(value.shape), trainable=value.requires_grad)


def _vocabulary_cut(name: str, value: nn.Parameter) -> ParameterSpec:
    cut = Cut(dim=0, segments=(value.shape[0],), uneven="ceil")
    return ParameterSpec(name=name, shape=tuple(value.shape), cut=cut, trainable=value.requires_grad)
