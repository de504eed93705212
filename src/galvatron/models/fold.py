"""Parameters that follow each other and are alike, as one line of a family's data.

Takes a Shape for each parameter, in order; gives fewer, of the same parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence

from galvatron.core.errors import ConfigError
from galvatron.core.family import Family
from galvatron.core.known import Shape
from galvatron.core.model import ModelSpec


def folded(shapes: Iterable[Shape], transposed: Collection[str] = ()) -> tuple[Shape, ...]:
    """``shapes`` with biases told of with their weights, and what is alike told once.

    ``transposed``: linears whose weights are [inputs, outputs].
    """
    found: list[Shape] = []
    for shape in shapes:
        together = _with_bias(found[-1], shape, transposed) if found else None
        found = [*found[:-1], together] if together is not None else [*found, shape]
    groups = itertools.groupby(found, lambda shape: shape.model_copy(update={"names": ("",)}))
    return tuple(
        alike.model_copy(update={"names": tuple(name for shape in group for name in shape.names)})
        for alike, group in groups
    )


def _with_bias(weight: Shape, bias: Shape, transposed: Collection[str]) -> Shape | None:
    """Both as one; None where they are no module's weight and bias, or are otherwise unlike."""
    module = weight.names[0].removesuffix(".weight")
    if bias.names != (f"{module}.bias",) or not weight.when.items() <= bias.when.items():
        return None
    is_transposed = module in transposed
    outputs = weight.shape[-1 if is_transposed else 0]
    alike = weight.model_copy(update={"names": bias.names, "shape": (outputs,), "when": bias.when})
    flags = [name for name in bias.when if name not in weight.when]
    if weight.words or alike != bias or len(flags) > 1 or not all(bias.when[name] for name in flags):
        return None
    flag = flags[0] if flags else True
    return weight.model_copy(update={"names": (module,), "bias": flag, "transposed": is_transposed})


def transposed_in(spec: ModelSpec, family: Family, stack: int) -> set[str]:
    """The linears of a stack's layers that are cut along the other dim than most, by their paths there."""
    regions = family.stacks[stack].regions
    dims = {column: 1 for region in regions for column in region.columns} | {region.row: 0 for region in regions}
    layers = spec.kind_of_layers()[spec.stack_ranges[stack].start : spec.stack_ranges[stack].stop]
    cuts = {p.name: p.cut for kind in layers for p in kind.parameters}
    return {name for name, dim in dims.items() if (cut := cuts.get(f"{name}.weight")) is not None and cut.dim == dim}


def repeated(shapes: Sequence[Shape], path: str, each: str) -> tuple[Shape, ...]:
    """``shapes`` with those of the first module of the list at ``path`` for all of them, of which ``each`` counts.

    Raises:
        ConfigError: the modules are not alike.
    """
    before = f"{path}."
    kept = tuple(shape for shape in shapes if not shape.names[0].startswith(before))
    modules: dict[str, list[Shape]] = {}
    for shape in shapes:
        if shape.names[0].startswith(before):
            number, _, rest = shape.names[0].removeprefix(before).partition(".")
            modules.setdefault(number, []).append(
                shape.model_copy(update={"names": (f"{before}*.{rest}",), "each": each})
            )
    first, *others = modules.values()
    if any(other != first for other in others):
        raise ConfigError(f"the layers of {path} are not alike; keep the type out of the data")
    place = next(at for at, shape in enumerate(shapes) if shape.names[0].startswith(before))
    return (*kept[:place], *first, *kept[place:])
