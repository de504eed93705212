"""The loss of pairs of images and texts, each against all others of the batch: CLIP's and SigLIP's.

B pairs of this rank, G of all data-parallel ranks, D units of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from galvatron.core.errors import ConfigError

from ..processes.collectives import AxisGroup, gather_sequence, own_part


@dataclass(frozen=True)
class Pairs:
    """How well this rank's texts go with all images, and its images with all texts.

    Attributes:
        of_texts, of_images: float32 [B, G].
        place: int64 [B], which of G is a rank's own.
        has_bias: whether a pair is told right or wrong by itself, by the sign of its score.
    """

    of_texts: Tensor
    of_images: Tensor
    place: Tensor
    has_bias: bool

    def loss_share(self, weight: float) -> Tensor:
        """This rank's share of ``weight`` x the summed losses of G pairs, a float32 scalar.

        Softmax over the others, of texts and of images alike, halved each (Radford et al. 2021), or with a bias a
        sigmoid of every pair (Zhai et al. 2023), as transformers has them.
        """
        if self.has_bias:
            sign = torch.full_like(self.of_texts, -1.0).scatter_(1, self.place.unsqueeze(1), 1.0)
            return -F.logsigmoid(sign * self.of_texts).sum() * weight
        halves = [F.cross_entropy(of, self.place, reduction="sum") for of in (self.of_texts, self.of_images)]
        return torch.stack(halves).sum() * (weight / 2)

    def right_share(self, weight: float) -> Tensor:
        """The same of how often nothing of the batch goes better with a text, or an image, than its own; halved each.

        What goes as well as the own (an equal text) does not count against it.
        """
        halves = [(of.gather(1, self.place.unsqueeze(1)) >= of).all(dim=1) for of in (self.of_texts, self.of_images)]
        return torch.stack(halves).sum() * (weight / 2)


def pairs_of(outputs: Any, logit_scale: Tensor, logit_bias: Tensor | None, dp: AxisGroup) -> Pairs:
    """Of a model's ``outputs`` with ``text_embeds`` and ``image_embeds`` [B, D] of length one.

    ``dp``: the ranks that have the other pairs.
    """
    if not {"text_embeds", "image_embeds"} <= set(outputs):
        raise ConfigError("a contrast needs text_embeds and image_embeds of the model, which gives neither")
    own_text, own_image = outputs.text_embeds.float(), outputs.image_embeds.float()
    text, image = (gather_sequence(own.unsqueeze(0), dp)[0] for own in (own_text, own_image))
    place = own_part(torch.arange(len(text), device=text.device).unsqueeze(0), dp)[0]
    scale, bias = logit_scale.float().exp(), 0.0 if logit_bias is None else logit_bias.float()
    of_texts, of_images = own_text @ image.t() * scale + bias, own_image @ text.t() * scale + bias
    return Pairs(of_texts, of_images, place, has_bias=logit_bias is not None)
