"""What tensors cannot have of a device's memory, and which attention runs there: measured, not assumed.

Takes a CUDA device in use; gives bytes outside PyTorch's allocator, and what the allocator keeps beyond tensors.
Knows nothing of units or plans.  CPUs have neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from galvatron.internals import ATTENTION, TorchDispatchMode, clear_cublas_workspaces

ROOM = 0.5
"""Which part of the free memory a measurement may fill: a backward needs some of the rest, and fragments do."""


def outside_bytes(device: torch.device) -> int | None:
    """Bytes of ``device`` in use outside PyTorch's allocator: context, kernels, libraries, communicators.

    Other processes on the device count too, for tensors cannot have that either.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def context_bytes(device: torch.device) -> int | None:
    """What a process that has computed takes of ``device`` beyond its tensors: ``outside_bytes``, and the workspaces
    that cuBLAS keeps within the allocator.
    """
    outside = outside_bytes(device)
    return None if outside is None else outside + cublas_bytes(device)


def cublas_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device's allocator that cuBLAS works in; freed, until it is called again."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    clear_cublas_workspaces()
    return before - torch.cuda.memory_allocated(device)


class OutsideGrowth:
    """The most that was in use outside the allocator at any look, beyond what was at the start."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._start_bytes, self.most_bytes = device, outside_bytes(device), 0

    def look(self) -> None:
        """Look once; nothing on CPU."""
        now_bytes = outside_bytes(self._device)
        if now_bytes is not None and self._start_bytes is not None:
            self.most_bytes = max(self.most_bytes, now_bytes - self._start_bytes)


def fitting(device: torch.device, most: int, once: Callable[[], object]) -> int:
    """How often (1 to ``most``) a CUDA device can hold what ``once`` gives, with all that it keeps alive."""
    if most == 1:
        return most
    free, _ = torch.cuda.mem_get_info(device)
    before = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - before  # the allocator gives that again
    held = once()
    kept = torch.cuda.memory_allocated(device) - before
    del held
    return min(max(int(ROOM * free / max(kept, 1)), 1), most)


def allocator_slack(device: torch.device, run: Callable[[], object]) -> float:
    """What the allocator of a CUDA device reserves beyond the most that is allocated in ``run``, as a part of that."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device) / max(torch.cuda.max_memory_allocated(device), 1) - 1.0


def attention_backend(run: Callable[[], object]) -> str:
    """Which of its backends ``scaled_dot_product_attention`` takes in ``run``: flash, cudnn, efficient, or math."""
    with _AttentionSeen() as seen:
        run()
    return " and ".join(sorted(seen.names)) or "math"  # math is made of ordinary products


class _AttentionSeen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATTENTION:
            name, _, _ = func.name().removeprefix("aten::_scaled_dot_product_").partition("_attention")
            self.names.add(name)
        return func(*args, **(kwargs or {}))
