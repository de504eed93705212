"""The fused projection and loss against torch's cross entropy on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from galvatron.parallelize import init_world
from galvatron.parallelize.layers import later
from galvatron.parallelize.losses import fused
from galvatron.parallelize.losses.fused import (
    IGNORED,
    EarlyGradient,
    LossTerms,
    chunk_tokens,
    projected_cross_entropy_share,
)
from galvatron.parallelize.processes.collectives import AxisGroup
from galvatron.testing.pool import Pool

TOKENS, HIDDEN, VOCABULARY = 150, 24, 101
SCALE = 1 / 90
ALONE = AxisGroup(None, (), 0)
TERMS = {
    "plain": LossTerms(),
    "scale and cap": LossTerms(logit_scale=0.25, soft_cap=1.5),
    "smoothing": LossTerms(label_smoothing=0.1),
    "z-loss": LossTerms(z_loss=1e-2),
    "all": LossTerms(logit_scale=2.0, soft_cap=3.0, label_smoothing=0.2, z_loss=1e-3),
}


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias (leaves that ask for gradients) and labels, a third of them ignored."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[::3] = IGNORED
    return tensors[0], tensors[1], tensors[2], labels


def reference(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, terms: LossTerms) -> Tensor:
    """The same loss by torch, in float64, from whole logits."""
    z = F.linear(hidden.double(), weight.double(), bias.double()) * terms.logit_scale
    if terms.soft_cap is not None:
        z = torch.tanh(z / terms.soft_cap) * terms.soft_cap
    loss = F.cross_entropy(z, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=terms.label_smoothing)
    return SCALE * (loss + terms.z_loss * (z.logsumexp(dim=-1).square() * (labels != IGNORED)).sum())


def relative_error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).abs().max() / truth.abs().max())


def on_rank(terms: LossTerms, chunk: int) -> tuple[float, list[Tensor]]:
    """This rank's share of the loss, and its gradients: of hidden a part of a sum, of weight and bias its rows."""
    world = init_world("cpu")
    tp = AxisGroup(world.group(tuple(range(world.world_size))), (world.world_size,), world.rank)
    hidden, weight, bias, labels = inputs()
    per_rank = -(-VOCABULARY // tp.size)
    start, stop = tp.rank * per_rank, min((tp.rank + 1) * per_rank, VOCABULARY)
    own_weight = weight.detach()[start:stop].requires_grad_()
    own_bias = bias.detach()[start:stop].requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "chunk_tokens", lambda *_: chunk)
        share = projected_cross_entropy_share(
            hidden, own_weight, labels, start, SCALE, tp, bias_V=own_bias, vocabulary_size=VOCABULARY, terms=terms
        )
    share.backward()
    gradients = [tensor.grad for tensor in (hidden, own_weight, own_bias)]
    assert all(gradient is not None for gradient in gradients)
    return float(share.detach()), gradients  # type: ignore[return-value]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", TERMS)
def test_equals_cross_entropy_on_whole_logits(pool: Pool, name: str, world_size: int) -> None:
    hidden, weight, bias, labels = inputs()
    truth = reference(hidden, weight, bias, labels, TERMS[name])
    truth.backward()
    found = pool.run(on_rank, TERMS[name], 64, world_size=world_size)
    assert sum(share for share, _ in found) == pytest.approx(float(truth.detach()), rel=1e-6)
    ours = [
        torch.stack([gradients[0] for _, gradients in found]).sum(dim=0),
        torch.cat([gradients[1] for _, gradients in found]),
        torch.cat([gradients[2] for _, gradients in found]),
    ]
    for gradient, tensor in zip(ours, (hidden, weight, bias), strict=True):
        assert tensor.grad is not None
        assert relative_error(gradient, tensor.grad) < 2e-6


def cuts_of_tokens(dtype: torch.dtype) -> tuple[list[int], float]:
    """Tokens of each chunk and block that this rank makes, and its share of the loss."""
    world = init_world("cpu")
    tp = AxisGroup(world.group((0, 1)), (2,), world.rank)
    hidden, weight, bias, labels = inputs(dtype)
    own = slice(0, 51) if world.rank == 0 else slice(51, VOCABULARY)
    sizes: list[int] = []
    chunked, blocked = fused._take_chunk, fused._take_block
    with pytest.MonkeyPatch.context() as patch:
        # fit twice as many tokens of the second rank's 50 rows as of the first one's 51
        patch.setattr(fused, "CHUNK_BYTES", 50 * dtype.itemsize * 64)
        patch.setattr(fused, "BLOCK_BYTES", 50 * 4 * 16)
        patch.setattr(fused, "_take_chunk", lambda *args: sizes.append(len(args[0])) or chunked(*args))  # type: ignore[func-returns-value]
        patch.setattr(fused, "_take_block", lambda *args, **kw: sizes.append(len(args[0])) or blocked(*args, **kw))  # type: ignore[func-returns-value]
        share = projected_cross_entropy_share(
            hidden, weight[own], labels, own.start, SCALE, tp, bias_V=bias[own], vocabulary_size=VOCABULARY
        )
    return sizes, float(share.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_of_uneven_rows_cut_tokens_alike(pool: Pool, dtype: torch.dtype) -> None:
    (sizes, share), (others, other_share) = pool.run(cuts_of_tokens, dtype, world_size=2)
    chunk, last = ([32, 32], [22, 22]) if dtype == torch.float32 else ([32, 8, 8, 8, 8], [22, 8, 8, 6])
    assert sizes == others == chunk * 4 + last
    truth = reference(*inputs(dtype), LossTerms())
    assert share + other_share == pytest.approx(float(truth.detach()), rel=1e-6 if dtype == torch.float32 else 1e-2)


def test_gradients_of_bf16_are_summed_in_float32() -> None:
    hidden, weight, bias, labels = inputs(torch.bfloat16)
    truth = reference(hidden, weight, bias, labels, LossTerms())
    exact = torch.autograd.grad(truth, (hidden, weight, bias))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "chunk_tokens", lambda *_: 16)
        patch.setattr(later, "SLICE_ROWS", 32)
        patch.setattr(fused, "BLOCK_BYTES", 3 * 4 * VOCABULARY)
        share = projected_cross_entropy_share(hidden, weight, labels, 0, SCALE, ALONE, bias_V=bias)
    for ours, theirs in zip(torch.autograd.grad(share, (hidden, weight, bias)), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours, theirs.double()) < 2**-7  # one rounding of logits' gradients, one of the sum


def test_nothing_is_made_that_nobody_asks_for() -> None:
    hidden, weight, bias, labels = inputs()
    with torch.no_grad():
        share = projected_cross_entropy_share(hidden, weight, labels, 0, SCALE, ALONE, bias_V=bias)
    assert not share.requires_grad
    frozen = projected_cross_entropy_share(hidden, weight.detach(), labels, 0, SCALE, ALONE)
    frozen.backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_all_labels_ignored_give_zero() -> None:
    hidden, weight, _, labels = inputs()
    share = projected_cross_entropy_share(hidden, weight, torch.full_like(labels, IGNORED), 0, SCALE, ALONE)
    share.backward()
    assert float(share.detach()) == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_chunks_are_bounded_in_bytes() -> None:
    assert chunk_tokens(128_256, torch.bfloat16) == 2048
    assert chunk_tokens(128_256, torch.float32) == 1024
    assert chunk_tokens(10**9, torch.float32) == 1


def test_the_weights_gradient_waits_in_one_sum() -> None:
    hidden, weight, _, labels = inputs()
    early = EarlyGradient()
    shares = [
        projected_cross_entropy_share(part, weight, own, 0, SCALE, ALONE, early=early)
        for part, own in zip(hidden.chunk(3), labels.chunk(3), strict=True)
    ]
    assert [tensor.shape for tensor in early.tensors()] == [weight.shape]
    for share in shares[:2]:
        share.backward()
        assert weight.grad is None
    shares[2].backward()
    assert early.tensors() == []
    truth = torch.autograd.grad(reference(hidden, weight, torch.zeros(VOCABULARY), labels, LossTerms()), weight)[0]
    assert weight.grad is not None
    assert relative_error(weight.grad, truth) < 2e-6
