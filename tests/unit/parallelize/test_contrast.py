"""Pairs contrasted by ranks that have some of them each, against the loss of all on one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from galvatron.core.errors import ConfigError
from galvatron.parallelize.losses.contrast import pairs_of
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


def between_ranks(bias: Tensor | None) -> tuple[float, float, tuple[Tensor, ...]]:
    """The loss, the share told right, and gradients."""
    text, image, scale = embeddings()
    ranks = Lockstep(RANKS)

    def share(rank: int) -> Tensor:
        own = slice(rank * PAIRS // RANKS, (rank + 1) * PAIRS // RANKS)
        outputs = _Outputs(text_embeds=text[own], image_embeds=image[own])
        pairs = pairs_of(outputs, scale, bias, AxisGroup(ranks, (RANKS,), rank))
        found = pairs.loss_share(1 / PAIRS)
        gradients = torch.autograd.grad(found, (text, image, scale))
        numbers = torch.stack([found.detach(), pairs.right_share(1 / PAIRS)])
        return torch.cat([numbers, *(gradient.flatten() for gradient in gradients)])

    total = sum(ranks.run(share))
    assert isinstance(total, Tensor)
    return float(total[0]), float(total[1]), total[2:].split([text.numel(), image.numel(), 1])


def test_shares_of_ranks_are_clips_own_loss_and_gradients() -> None:
    text, image, scale = embeddings()
    logits, own = text @ image.t() * scale.exp(), torch.arange(PAIRS)
    loss = (cross_entropy(logits, own) + cross_entropy(logits.t(), own)) / 2
    wanted = torch.autograd.grad(loss, (text, image, scale))
    found, right, gradients = between_ranks(None)
    assert found == pytest.approx(loss.item(), rel=1e-6)
    shares = [(of.argmax(1) == own).float().mean().item() for of in (logits, logits.t())]
    assert 0 < right < 1
    assert right == pytest.approx(sum(shares) / 2)
    for own, whole in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(own, whole.flatten(), rtol=1e-5, atol=1e-6)


def test_shares_of_ranks_are_siglips_own_loss() -> None:
    text, image, scale = embeddings()
    logits = text @ image.t() * scale.exp() - 0.5
    sign = 2 * torch.eye(PAIRS) - 1
    loss = -logsigmoid(sign * logits).sum(dim=-1).mean()
    found, *_ = between_ranks(torch.tensor(-0.5))
    assert found == pytest.approx(loss.item(), rel=1e-6)


def test_a_model_without_embeddings_is_refused() -> None:
    with pytest.raises(ConfigError, match="a contrast needs text_embeds and image_embeds"):
        pairs_of(_Outputs(logits=torch.zeros(1)), torch.zeros(()), None, ALONE)


def test_an_equal_text_does_not_count_against_the_own() -> None:
    _, image, scale = embeddings()
    twice = image[:1].expand(2, -1)
    pairs = pairs_of(_Outputs(text_embeds=twice, image_embeds=twice), scale, None, ALONE)
    assert float(pairs.right_share(1 / 2)) == 1
