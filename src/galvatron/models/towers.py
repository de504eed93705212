"""Towers of layers whose states have no dim of samples: the patches of all images of a batch, one after the other.

Takes a twin and the stacks that its layers were found in; gives the path of the module that runs as one.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from galvatron.core.family import Family
from galvatron.core.model import Tower
from galvatron.core.model.tower import windows_of

from .grids import GRIDS, PIXELS, Grids, positions_beside_images
from .heads import heads_in
from .twin import run_twin, twin_inputs


class OwnWay(Exception):
    """What a model does in no way that is known, in words."""


def tower_of(model: PreTrainedModel, packed: list[nn.ModuleList], stacks: list[nn.ModuleList]) -> str | None:
    """The outermost module that has the ``packed`` layers and none of the others; None where there are none.

    Raises:
        OwnWay: the model's images are no patches with grids, or their tokens are counted in a way of its own.
    """
    if not packed:
        return None
    holding = [
        name
        for name, module in model.named_modules()
        if is_within(packed[0], module) and not any(is_within(s, module) for s in stacks)
    ]
    decoder = next(name for name, module in model.named_modules() if module is stacks[-1]).rpartition(".")[0]
    if Grids.of(model.config) is None or not _places_images(model, decoder):
        raise OwnWay("takes images in a way of its own")
    return min(holding, key=len)


@torch.no_grad()
def _places_images(model: PreTrainedModel, decoder: str) -> bool:
    """Whether positions can be told as the model counts them, and its ``decoder`` is given embeddings by name."""
    given: list[str] = []
    handle = model.get_submodule(decoder).register_forward_pre_hook(
        lambda module, args, kwargs: given.extend(kwargs), with_kwargs=True
    )
    inputs = twin_inputs(model.config)
    told = {name: inputs[name] for name in ("input_ids", PIXELS, GRIDS)}
    positions = positions_beside_images(model, inputs)
    is_same = torch.equal(run_twin(model, inputs), run_twin(model, {**told, "position_ids": positions}))
    handle.remove()
    return is_same and "inputs_embeds" in given


def is_within(stack: nn.ModuleList, other: nn.Module) -> bool:
    """Whether ``other`` has it, or is it."""
    return any(module is stack for module in other.modules())


def tower_layers(model: PreTrainedModel, family: Family) -> tuple[str, nn.ModuleList] | None:
    """The path of a tower's list of layers, and the list; None where a model has no tower."""
    if family.tower is None:
        return None
    within = model.get_submodule(family.tower).named_modules(prefix=family.tower)
    return next((name, module) for name, module in within if isinstance(module, nn.ModuleList))


def described_tower(model: PreTrainedModel, family: Family) -> Tower | None:
    """What ``ModelSpec`` says of a model's tower."""
    layers, grids = tower_layers(model, family), Grids.of(model.config)
    if layers is None or grids is None:
        return None
    path, (first, *_) = layers
    windows = windows_of(model.config.vision_config.to_dict())
    return Tower(layers=path, num_heads=heads_in(first, model.config)["heads"], merge=grids.merge, **windows)
