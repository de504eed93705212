from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from test_checkpoint import load, save
from torch import nn
from train_fakes import FakeModel, section

from galvatron.train import offload
from galvatron.train.memory import PeakMemory
from galvatron.train.offload import MOMENTS, OffloadedAdamW, host_tensors
from galvatron.train.optimizer import build_optimizer

SHAPES = [(33, 57), (64,), (128, 40), (7,), (90, 90)]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}


@pytest.fixture(autouse=True)
def _short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SLICE_ELEMENTS", 1000)


def groups(parameters: list[nn.Parameter]) -> list[dict[str, object]]:
    return [{"params": parameters[:3], "weight_decay": 0.1}, {"params": parameters[3:], "weight_decay": 0.0}]


def pair() -> tuple[OffloadedAdamW, torch.optim.AdamW, list[nn.Parameter], list[nn.Parameter]]:
    """All but the first parameter in host memory, two units; and the same on the device."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    hosted = {parameter: f"layer {index // 2}" for index, parameter in enumerate(ours[1:])}
    return OffloadedAdamW(groups(ours), hosted, **OPTIONS), torch.optim.AdamW(groups(theirs), **OPTIONS), ours, theirs


def test_updates_are_those_of_moments_on_the_device() -> None:
    mine, plain, ours, theirs = pair()
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in (mine, plain):
            optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
            optimizer.found_inf = torch.tensor(float(step == 2))  # type: ignore[attr-defined]
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            assert mine.state[a]["step"] == plain.state[b]["step"] == step + (step < 2)
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
            for name in MOMENTS:
                torch.testing.assert_close(mine.state[a][name], plain.state[b][name], rtol=1e-6, atol=1e-8)


def test_slices_have_every_element_of_one_unit_once() -> None:
    mine, _, ours, _ = pair()
    seen: Counter[tuple[int, int]] = Counter()
    for own in mine._slices:
        assert own.elements <= 1000
        assert len({mine.hosted[piece.parameter] for piece in own.pieces}) == 1
        for piece in own.pieces:
            assert any(piece.parameter is p for p in mine.param_groups[own.group]["params"])
            index = next(i for i, p in enumerate(ours) if p is piece.parameter)
            seen.update((index, element) for element in range(piece.start, piece.stop))
    assert seen == Counter((i, element) for i, p in enumerate(ours) if i for element in range(p.numel()))


def test_nothing_is_updated_that_has_no_gradient() -> None:
    mine, _, ours, _ = pair()
    before = [parameter.detach().clone() for parameter in ours]
    ours[4].grad = torch.ones(SHAPES[4])
    mine.step()
    assert [torch.equal(a, b) for a, b in zip(ours, before, strict=True)] == [True, True, True, True, False]
    assert ours[4].grad is not None


def test_what_passes_through_is_counted_and_what_stays_in_host_memory_is_not() -> None:
    peaks = {}
    for unit in (None, "all"):
        model = FakeModel.make(seed=1)
        for part in model.local_parameters:
            part.travels_with = unit
        optimizer, memory = build_optimizer(model.local_parameters, section()), PeakMemory(torch.device("cpu"))
        with memory.watch(model, optimizer):
            for part in model.local_parameters:
                part.tensor.grad = torch.ones_like(part.tensor)
            optimizer.step()
        peaks[unit] = memory.bytes()
    moments = sum(tensor.nbytes for tensor in host_tensors(optimizer))
    assert moments == sum(2 * part.tensor.nbytes for part in model.local_parameters)
    assert 0 <= peaks["all"] - (peaks[None] - moments) <= offload.SLOTS * 8 * 1000 + 1000


def test_checkpoints_go_from_one_memory_to_the_other(tmp_path: Path) -> None:
    model, twin = FakeModel.make(seed=1), FakeModel.make(seed=2)
    for part in model.local_parameters:
        part.travels_with = "all"
    directory, saved = save(tmp_path, model, step=20)
    _, loaded = load(directory, twin)
    assert isinstance(saved, OffloadedAdamW)
    assert not isinstance(loaded, OffloadedAdamW)
    for ours, theirs in zip(model.local_parameters, twin.local_parameters, strict=True):
        for moment in MOMENTS:
            assert torch.equal(saved.state[ours.tensor][moment], loaded.state[theirs.tensor][moment])
