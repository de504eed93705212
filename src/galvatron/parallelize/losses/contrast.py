"""The loss of pairs of images and texts, each against all others of the batch: CLIP's and SigLIP's.

B pairs of this rank, G of all data-parallel ranks, D units of an embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from galvatron.core.errors import ConfigError

from ..processes.collectives import AxisGroup, gather_sequence, own_part


def contrast_share(
    outputs: Any, logit_scale: Tensor, logit_bias: Tensor | None, weight: float, dp: AxisGroup
) -> Tensor:
    """This rank's share of ``weight`` x the summed losses of G pairs, a float32 scalar.

    Softmax over the others, of texts and of images alike, halved each (Radford et al. 2021), or with a ``logit_bias``
    a sigmoid of every pair (Zhai et al. 2023), as transformers has them.

    Args:
        outputs: with ``text_embeds`` and ``image_embeds`` [B, D] of length one.
        dp: the ranks that have the other pairs.
    """
    if not {"text_embeds", "image_embeds"} <= set(outputs):
        raise ConfigError("a contrast needs text_embeds and image_embeds of the model, which gives neither")
    own_text, own_image = outputs.text_embeds.float(), outputs.image_embeds.float()
    text, image = (gather_sequence(own.unsqueeze(0), dp)[0] for own in (own_text, own_image))
    place = own_part(torch.arange(len(text), device=text.device).unsqueeze(0), dp)[0]
    scale = logit_scale.float().exp()
    of_texts = own_text @ image.t() * scale
    if logit_bias is not None:
        sign = torch.full_like(of_texts, -1.0).scatter_(1, place.unsqueeze(1), 1.0)
        return -F.logsigmoid(sign * (of_texts + logit_bias.float())).sum() * weight
    of_images = own_image @ text.t() * scale
    halves = F.cross_entropy(of_texts, place, reduction="sum") + F.cross_entropy(of_images, place, reduction="sum")
    return halves * (weight / 2)
