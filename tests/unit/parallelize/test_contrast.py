"""Pairs contrasted by ranks that have some of them each, against the loss of all on one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from galvatron.core.errors import ConfigError
from galvatron.parallelize.losses.contrast import contrast_share
from galvatron.parallelize.processes.collectives import ALONE, AxisGroup
from galvatron.parallelize.processes.lockstep import Lockstep

RANKS, PAIRS, UNITS = 2, 6, 5


class _Outputs(dict[str, Tensor]):
    __getattr__ = dict.__getitem__


def embeddings() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    drawn = (torch.randn(PAIRS, UNITS) for _ in range(2))
    text, image = (normalize(values, dim=-1).requires_grad_() for values in drawn)
    return text, image, torch.tensor(1.3, requires_grad=True)


def between_ranks(bias: Tensor | None) -> tuple[float, tuple[Tensor, ...]]:
    text, image, scale = embeddings()
    ranks = Lockstep(RANKS)

    def share(rank: int) -> Tensor:
        own = slice(rank * PAIRS // RANKS, (rank + 1) * PAIRS // RANKS)
        outputs = _Outputs(text_embeds=text[own], image_embeds=image[own])
        found = contrast_share(outputs, scale, bias, 1 / PAIRS, AxisGroup(ranks, (RANKS,), rank))
        gradients = torch.autograd.grad(found, (text, image, scale))
        return torch.cat([found.detach().reshape(1), *(gradient.flatten() for gradient in gradients)])

    total = sum(ranks.run(share))
    assert isinstance(total, Tensor)
    return float(total[0]), total[1:].split([text.numel(), image.numel(), 1])


def test_shares_of_ranks_are_clips_own_loss_and_gradients() -> None:
    text, image, scale = embeddings()
    logits, own = text @ image.t() * scale.exp(), torch.arange(PAIRS)
    loss = (cross_entropy(logits, own) + cross_entropy(logits.t(), own)) / 2
    wanted = torch.autograd.grad(loss, (text, image, scale))
    found, gradients = between_ranks(None)
    assert found == pytest.approx(loss.item(), rel=1e-6)
    for own, whole in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(own, whole.flatten(), rtol=1e-5, atol=1e-6)


def test_shares_of_ranks_are_siglips_own_loss() -> None:
    text, image, scale = embeddings()
    logits = text @ image.t() * scale.exp() - 0.5
    sign = 2 * torch.eye(PAIRS) - 1
    loss = -logsigmoid(sign * logits).sum(dim=-1).mean()
    found, _ = between_ranks(torch.tensor(-0.5))
    assert found == pytest.approx(loss.item(), rel=1e-6)


def test_a_model_without_embeddings_is_refused() -> None:
    with pytest.raises(ConfigError, match="a contrast needs text_embeds and image_embeds"):
        contrast_share(_Outputs(logits=torch.zeros(1)), torch.zeros(()), None, 1.0, ALONE)
