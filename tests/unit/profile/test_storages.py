from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from galvatron.profile.storages import StorageLog

KIB = 1024


def test_storages_count_once_and_only_while_they_live():
    outside = torch.zeros(KIB)
    with StorageLog() as log:
        log.ignore([outside])
        a = torch.ones(KIB)  # 4 KiB
        view = a.view(32, 32)[3:]
        outside.view(-1)
        assert log.live_bytes() == 4 * KIB
        b = a + 1
        assert log.live_bytes() == 8 * KIB
        del a
        assert log.live_bytes() == 8 * KIB  # the view keeps it
        del view, b
        assert log.live_bytes() == 0
        torch.ones(2 * KIB)
        assert log.peak_bytes() == 8 * KIB


def test_storages_ignored_late_leave_the_past_peak_too():
    with StorageLog() as log:
        a = torch.ones(KIB)
        b = torch.ones(2 * KIB)
        del a
        log.ignore([b])
        assert (log.live_bytes(), log.peak_bytes()) == (0, 4 * KIB)


def _mlp_bytes(dtype: torch.dtype, fake: bool) -> tuple[int, int]:
    with FakeTensorMode() if fake else contextlib.nullcontext():
        layer = nn.Sequential(nn.Linear(64, 256, dtype=dtype), nn.GELU(), nn.Linear(256, 64, dtype=dtype))
        x = torch.ones(2, 8, 64, dtype=dtype, requires_grad=True)
        with StorageLog() as log:
            log.ignore([x, *layer.parameters()])
            y = layer(x)
            log.ignore([y])
            saved = log.live_bytes()
            y.sum().backward()
        return saved, log.peak_bytes()


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_fake_tensors_count_as_real_ones_do(dtype, size):
    fake = _mlp_bytes(dtype, fake=True)
    assert fake == _mlp_bytes(dtype, fake=False)
    assert fake[0] == 2 * (2 * 8 * 256) * size  # the two sides of the GELU


def test_resized_storages_are_looked_up_before_every_operation() -> None:
    buffer = torch.empty(0, dtype=torch.uint8)
    with StorageLog(resized=lambda: [buffer]) as log:
        buffer.untyped_storage().resize_(1000)
        other = torch.empty(10, dtype=torch.uint8)
        buffer.untyped_storage().resize_(0)
        torch.empty(20, dtype=torch.uint8)
    assert log.peak_bytes() == 1010
    assert log.live_bytes() == 10 == other.numel()
