"""Towers of layers whose states have no dim of samples: the patches of all images of a batch, one after the other.

Takes a twin and the stacks that its layers were found in; gives the path of the module that runs as one.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from .grids import GRIDS, PIXELS, Grids, positions_beside_images
from .twin import run_twin, twin_inputs


def tower_of(model: PreTrainedModel, packed: list[nn.ModuleList], stacks: list[nn.ModuleList]) -> str | None:
    """The outermost module that has the ``packed`` layers and none of the others; None where there are none.

    Raises:
        ValueError: the model's images are no patches with grids, or their tokens are counted in a way of its own.
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
        raise ValueError("images come in a way of their own")
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
