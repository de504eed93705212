"""A batch's images where a text has any number of any size: which of them a rank sees, and where all tokens stand.

A rank's tower sees the images of the texts that its embedding has.  Where tokens stand beside images is said for a
whole batch at once, by the model's own way to count, for layers may have other texts than the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from galvatron.internals import tree_map_only
from galvatron.models.grids import GRIDS, KINDS, PIXELS, Grids, positions_beside_images

POSITIONS = "position_ids"


@dataclass(frozen=True)
class ImageSteps:
    """A batch by microbatches: patches and grids of this rank's texts, and positions [3, texts, S] of all texts."""

    seen: tuple[dict[str, Tensor], ...]
    positions: tuple[Tensor, ...]
    device: torch.device

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        micro_batch_size: int,
        rows: range,
        device: torch.device,
        *,
        sees: bool,
    ) -> ImageSteps:
        """Of a batch's ``inputs``; ``rows`` of a microbatch are the embedding's; ``sees``: whether it is here."""
        grids = Grids.of(model.config)
        assert grids is not None
        first = range(0, len(inputs["input_ids"]), micro_batch_size)
        own = [[start + row for row in rows] for start in first] if sees else [[] for _ in first]
        seen = tuple(grids.of_rows(inputs, texts) if texts else {} for texts in own)
        return cls(seen, positions_beside_images(model, inputs).split(micro_batch_size, dim=1), device)

    def given(self, microbatch: int, told: range) -> dict[str, Tensor]:
        """What the model is given of ``microbatch``, with the positions of ``told`` texts."""
        positions = self.positions[microbatch][:, told.start : told.stop]
        return {name: self._sent(values) for name, values in (self.seen[microbatch] | {POSITIONS: positions}).items()}

    def _sent(self, values: Tensor) -> Tensor:
        """On the device; from pinned memory, or the host would wait for it."""
        if self.device.type == "cuda" and not values.is_cuda:
            values = values.contiguous().pin_memory()
        return values.to(self.device, non_blocking=True)


def see_something(model: PreTrainedModel, decoder: nn.Module, has_images: Callable[[], bool]) -> None:
    """Where no text has an image let ``model``'s tower see one that counts for nothing, before ``decoder`` runs.

    Its gradients are awaited, and FSDP2 wants all ranks to run the embedding's modules in one order.
    """

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if has_images():
            return None
        grids, hidden = Grids.of(model.config), kwargs["inputs_embeds"]
        assert grids is not None
        seen = model.get_image_features(**grids.smallest(hidden.device))  # type: ignore[operator]
        made: list[Tensor] = []
        tree_map_only(Tensor, made.append, tuple(seen.values()))  # layers may be given states of the tower's too
        nothing = sum(0 * part.sum().to(hidden.dtype) for part in made if part.requires_grad)
        return args, {**kwargs, "inputs_embeds": hidden + nothing}

    decoder.register_forward_pre_hook(see, with_kwargs=True)


def without_images(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What has a row a text."""
    return {name: values for name, values in inputs.items() if name not in (PIXELS, GRIDS, KINDS)}
