"""How tensor parallelism cuts the parameters of a layer: what its family says of modules, at the layer's own shapes.

Takes a stack and the shapes of one of its layers, of a module or by formula; gives cuts by the parameters' names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Literal

from .family import Blocks, Experts, Region, Stack
from .model import Cut

Shapes = Mapping[str, tuple[int, ...]]
"""Of a layer's uncut parameters, by name."""


def layer_cuts(
    stack: Stack, shapes: Shapes, counts: Mapping[Blocks, int], transposed: Collection[str]
) -> dict[str, Cut]:
    """The cuts of a layer with parameters of these ``shapes``; what is not named is whole.

    ``counts``: its ``heads`` and ``kv_heads``; ``transposed``: linears whose weights are [inputs, outputs].
    """
    found: dict[str, Cut] = {}
    for region in stack.regions:
        if all(f"{name}.weight" in shapes for name in (region.row, *region.columns)):
            found |= _of_region(region, shapes, counts, transposed)
    return found if stack.experts is None else found | dict(_of_experts(stack.experts, shapes))


def are_experts(name: str, shape: tuple[int, ...]) -> bool:
    """Whether dim 0 of a parameter counts experts: of batched matrices, or of biases beside them."""
    owner = name.rpartition(".")[0]
    return (".experts." in name and len(shape) == 3) or (owner.endswith(".experts") and len(shape) == 2)


def _of_region(
    region: Region, shapes: Shapes, counts: Mapping[Blocks, int], transposed: Collection[str]
) -> Iterator[tuple[str, Cut]]:
    row, inputs = f"{region.row}.weight", 0 if region.row in transposed else 1
    counts = {**counts, "kv_head": 1, "ffn": shapes[row][inputs]}
    for name, blocks in region.columns.items():
        segments, uneven = tuple(counts[block] for block in blocks), _uneven(region, blocks)
        yield f"{name}.weight", Cut(dim=int(name in transposed), segments=segments, uneven=uneven)
        yield f"{name}.bias", Cut(dim=0, segments=segments, uneven=uneven)
    for name, block in (*region.wide_norms.items(), *region.by_head.items()):
        for parameter in shapes:
            if parameter == name or parameter.startswith(f"{name}."):
                yield parameter, Cut(dim=region.by_head_dims.get(name, 0), segments=(counts[block],))
    yield row, Cut(dim=inputs, segments=(counts[region.row_blocks],))


def _uneven(region: Region, blocks: tuple[Blocks, ...]) -> Literal["refuse", "whole", "shared"]:
    """What becomes of kv heads fewer than tp."""
    if "kv_heads" in (*region.wide_norms.values(), *region.by_head.values()) or region.wide_norms:
        return "refuse"  # a norm over all of them leaves no way to keep them whole
    if "kv_head" in blocks or ("kv_heads" in blocks and len(blocks) > 1):
        return "shared"
    has_queries = any("heads" in others for others in region.columns.values())  # not in the same blocks
    return "whole" if blocks == ("kv_heads",) and has_queries else "refuse"


def _of_experts(experts: Experts, shapes: Shapes) -> Iterator[tuple[str, Cut]]:
    for own, (dim, segments) in experts.cuts.items():
        if (name := f"{experts.module}.{own}") in shapes:
            yield name, Cut(dim=dim, segments=(shapes[name][dim] // segments,) * segments)
