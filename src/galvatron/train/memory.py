"""The peak of a rank's tensor memory, measured the same way as it is predicted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from galvatron.profile.storages import StorageLog, storage_bytes

from .interface import TrainableModel
from .offload import host_tensors


class PeakMemory:
    """Most bytes of tensors alive at once on this rank; make it before the model.

    CUDA: the caching allocator's peak since then (``torch.cuda.max_memory_allocated``).  CPU, which has no such
    counter: every storage of the first step is followed from birth to death, and the parameters and optimizer
    states that were there before are added, but for moments in host memory, as if a device had one of its own.
    Libraries, pages the allocator keeps and communication buffers of gloo do not count.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counted: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def watch(
        self, model: TrainableModel, optimizer: torch.optim.Optimizer, batch: Iterable[torch.Tensor] = ()
    ) -> Iterator[None]:
        """Put around every step; on CPU the first one is slower, for it is counted, all but the given ``batch``."""
        if self._device.type == "cuda" or self._counted is not None:
            yield
            return
        elsewhere = list(host_tensors(optimizer))
        hosted = set(map(id, elsewhere))
        states = [value for state in optimizer.state.values() for value in state.values() if id(value) not in hosted]
        lasting = [*(part.tensor for part in model.local_parameters), *states]
        with StorageLog(resized=model.gathered_buffers) as log:
            yield
        log.ignore([*lasting, *elsewhere, *batch])  # where nothing is sharded, operations return views of parameters
        self._counted = storage_bytes(lasting) + log.peak_bytes()

    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._counted or 0
