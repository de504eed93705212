"""Kernels that PyTorch documents for its own use alone, against float64: attention in blocks, and grouped products.

Memory is filled with NaN and given back first, so that what a kernel leaves unwritten shows.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from galvatron.parallelize.layers.ring import ring_attention
from galvatron.parallelize.processes.collectives import ALONE
from galvatron.testing.models import tiny_config, tiny_model

_ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=_ON_GPU)]
PRECISIONS = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
POISON_BYTES = 2**26


def poison(device: str) -> None:
    del [torch.full((size // 4,), math.nan, device=device) for size in (POISON_BYTES, *[2**n for n in range(9, 21)])][:]


def attended(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, window: int | None, *, causal: bool
) -> Tensor:
    """By the formula; [B, N, S, D]."""
    tokens, fewer = query.shape[2], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(fewer, dim=1), value.repeat_interleave(fewer, dim=1)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if causal:
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
        sees = (distance >= 0) & (distance < (window or tokens))
        scores = scores.masked_fill(~sees, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    return scores.softmax(dim=-1)[..., :tokens] @ value


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 5), (False, None)])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("tokens", "head_dim"), [(16, 8), (133, 64)])
def test_attention_with_log_sums(
    device: str, dtype: torch.dtype, causal: bool, window: int | None, has_sinks: bool, tokens: int, head_dim: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, tokens, head_dim), (2, 2, tokens, head_dim), (2, 2, tokens, head_dim), (4,)]
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes[: 3 + has_sinks]]
    grad = torch.randn(shapes[0], generator=generator).to(dtype)
    truth = [one.double().requires_grad_() for one in drawn]
    own = [one.to(device).requires_grad_() for one in drawn]
    expected = attended(*truth[:3], truth[3] if has_sinks else None, window, causal=causal)
    expected.backward(grad.double())
    poison(device)
    sinks = own[3] if has_sinks else None
    out = ring_attention(own[0], own[1], own[2], ALONE, None, window, causal=causal, sinks_N=sinks)
    out.backward(grad.to(device))
    for found, true in [(out, expected), *((o.grad, t.grad) for o, t in zip(own, truth, strict=True))]:
        assert found is not None
        assert true is not None
        assert error(found, true) < PRECISIONS[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [0, 3], [2]], ids=str)
def test_experts_that_no_token_chose_have_gradients_of_zero(
    device: str, dtype: torch.dtype, family: str, chosen: list[int]
) -> None:
    experts = tiny_model(tiny_config(family)).model.layers[0].mlp.experts
    experts.config._experts_implementation = "grouped_mm"
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_((0.2 * torch.randn(parameter.shape, generator=generator)).to(dtype))
    count, hidden = 29, tiny_config(family).hidden_size
    tokens = torch.randn(count, hidden, generator=generator).to(dtype)
    index = torch.tensor(chosen)[torch.randint(len(chosen), (count, 1), generator=generator)]
    weights = torch.rand(count, 1, generator=generator).to(dtype)

    def run(kind: torch.dtype, place: str) -> dict[str, Tensor]:
        experts.to(device=place, dtype=kind).zero_grad()
        given = tokens.to(place, kind).requires_grad_()
        out = experts(given, index.to(place), weights.to(place, kind))
        out.square().sum().backward()
        found = {name: p.grad.clone() for name, p in experts.named_parameters()}
        return {"out": out.detach(), "tokens": given.grad, **found}

    experts.config._experts_implementation = "eager"
    truth = run(torch.float64, "cpu")
    experts.config._experts_implementation = "grouped_mm"
    poison(device)
    for name, found in run(dtype, device).items():
        assert error(found, truth[name]) < 4 * PRECISIONS[dtype], name


def error(found: Tensor, true: Tensor) -> float:
    """Of all elements together; NaN is infinite."""
    off = float((found.detach().cpu().double() - true.detach()).norm() / true.detach().norm())
    return off if math.isfinite(off) else math.inf
