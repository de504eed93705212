from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from galvatron.profile import device_memory
from galvatron.profile.device_memory import (
    OutsideGrowth,
    allocator_slack,
    attention_backend,
    context_bytes,
    fitting,
    outside_bytes,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30


class Gpu:
    """The counters of a device of 80 GiB, as torch.cuda reads them."""

    def __init__(self) -> None:
        self.outside, self.reserved, self.allocated, self.workspace = GIB // 2, 0, 0, 0
        self.most_reserved = self.most_allocated = 0

    def mem_get_info(self, _device: torch.device) -> tuple[int, int]:
        return 80 * GIB - self.outside - self.reserved, 80 * GIB

    def allocate(self, num_bytes: int, reserved: int) -> None:
        self.allocated, self.reserved = self.allocated + num_bytes, self.reserved + reserved
        self.most_allocated = max(self.most_allocated, self.allocated)
        self.most_reserved = max(self.most_reserved, self.reserved)

    def reset(self, _device: torch.device) -> None:
        self.most_allocated, self.most_reserved = self.allocated, self.reserved

    def clear_workspaces(self) -> None:
        self.allocated, self.workspace = self.allocated - self.workspace, 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    fakes = SimpleNamespace(
        synchronize=lambda _device: None,
        empty_cache=lambda: None,
        mem_get_info=made.mem_get_info,
        memory_reserved=lambda _device: made.reserved,
        memory_allocated=lambda _device: made.allocated,
        max_memory_reserved=lambda _device: made.most_reserved,
        max_memory_allocated=lambda _device: made.most_allocated,
        reset_peak_memory_stats=made.reset,
    )
    for name, fake in vars(fakes).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(device_memory, "clear_cublas_workspaces", made.clear_workspaces)
    return made


def test_a_cpu_has_no_context() -> None:
    assert outside_bytes(CPU) is None
    assert context_bytes(CPU) is None
    growth = OutsideGrowth(CPU)
    growth.look()
    assert growth.most_bytes == 0


def test_the_context_is_what_neither_is_free_nor_the_allocators_and_cublas(gpu: Gpu) -> None:
    gpu.allocate(9 * GIB, reserved=10 * GIB)
    assert outside_bytes(CUDA) == GIB // 2
    gpu.workspace = 2**26
    assert context_bytes(CUDA) == GIB // 2 + 2**26


def test_growth_is_the_most_at_any_look(gpu: Gpu) -> None:
    growth = OutsideGrowth(CUDA)
    for outside in (GIB, 2 * GIB, GIB // 2):
        gpu.outside = outside
        growth.look()
    assert growth.most_bytes == 2 * GIB - GIB // 2


def test_slack_is_what_the_peak_reserves_beyond_what_it_allocates(gpu: Gpu) -> None:
    gpu.allocate(30 * GIB, reserved=40 * GIB)
    gpu.allocate(-20 * GIB, reserved=-30 * GIB)  # an earlier peak, which does not count
    assert allocator_slack(CUDA, lambda: gpu.allocate(10 * GIB, 11 * GIB)) == pytest.approx(21 / 20 - 1)


def test_as_many_fit_as_half_of_what_is_free_holds(gpu: Gpu) -> None:
    gpu.allocate(GIB, reserved=GIB + GIB // 2)  # 79 - 1/2 GiB can be had, for the allocator gives back what it keeps
    keeps = 2 * GIB

    def once() -> None:
        gpu.allocate(keeps, keeps)

    assert fitting(CUDA, 100, once) == 19
    gpu.allocate(-keeps, -keeps)
    assert fitting(CUDA, 8, once) == 8
    assert fitting(CUDA, 1, lambda: pytest.fail("one needs no trial")) == 1
    gpu.allocate(70 * GIB, 70 * GIB)
    assert fitting(CUDA, 8, once) == 1


def test_the_backend_of_attention_is_seen_not_guessed() -> None:
    query = torch.randn(1, 2, 8, 16, requires_grad=True)
    assert attention_backend(lambda: F.scaled_dot_product_attention(query, query, query, is_causal=True)) == "flash"
    wide = torch.randn(1, 2, 8, 16, requires_grad=True, dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert attention_backend(lambda: F.scaled_dot_product_attention(wide, wide, wide, is_causal=True)) == "math"
