"""A log of every storage that is born and dies while PyTorch runs, on real or fake tensors.

Takes the operations run inside it; gives bytes alive now and at the peak.  Knows nothing of models.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from galvatron.internals import TorchDispatchMode, storage_address, tree_leaves
from galvatron.parallelize.layers.ring import INSIDE

_RESIZED = -1  # the serial that all resized storages share


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages under ``tensors``, each counted once."""
    storages = {storage_address(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class StorageLog(TorchDispatchMode):
    """Within, every storage that an operation makes is logged with its bytes when it appears and disappears.

    A storage counts once, however many tensors view it.  Storages that existed before are logged as soon as
    an operation returns a view of them, unless ``ignore`` was told of them.  Buffers that a kernel allocates
    and frees inside itself are not seen.  Storages change their size unseen; ``resized`` gives the tensors
    whose bytes are looked up before every operation instead.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs compiled in here too; only what its graph runs one by one is seen."""
        return True

    def __init__(self, resized: Callable[[], Iterable[torch.Tensor]] | None = None) -> None:
        super().__init__()
        self._resized, self._resized_bytes = resized, 0
        self._events: list[tuple[int, int]] = []  # (serial of the storage, bytes born > 0 or dead < 0)
        self._serials: dict[int, int] = {}  # address of a living storage → its serial
        self._ignored: set[int] = set()
        self._num_seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._resized is not None:
            self._look_up(storage_bytes(self._resized()))
        result = self._run(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._serial(leaf)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func not in INSIDE:
            return func(*args, **kwargs)
        with self:
            return INSIDE[func](*args, **kwargs)

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storages of ``tensors`` at no time, past or future."""
        self._ignored |= {self._serial(tensor) for tensor in tensors}

    def moment(self) -> int:
        """A name for now, to ask ``live_bytes`` about later."""
        return len(self._events)

    def seen(self, *but: torch.Tensor) -> frozenset[int]:
        """Names of all storages so far, but for those of some tensors, to ask ``live_bytes`` about later."""
        return frozenset(range(self._num_seen)) - set(map(self._serial, but))

    def live_bytes(self, moment: int | None = None, among: frozenset[int] | None = None) -> int:
        """Bytes of the storages alive now, or at an earlier ``moment``; what was ignored since does not count.

        ``among``: of some storages alone, which ``seen`` named.
        """
        self._ignore_resized()
        alive = self._events[:moment]
        return sum(n for serial, n in alive if serial not in self._ignored and (among is None or serial in among))

    def peak_bytes(self) -> int:
        """Most bytes that were alive at once."""
        self._ignore_resized()
        live = peak = 0
        for serial, num_bytes in self._events:
            if serial not in self._ignored:
                live += num_bytes
                peak = max(peak, live)
        return peak

    def _look_up(self, num_bytes: int) -> None:
        if num_bytes != self._resized_bytes:
            self._events.append((_RESIZED, num_bytes - self._resized_bytes))
            self._resized_bytes = num_bytes

    def _ignore_resized(self) -> None:
        if self._resized is not None:
            self.ignore(self._resized())

    def _serial(self, tensor: torch.Tensor) -> int:
        storage, address = tensor.untyped_storage(), storage_address(tensor)
        if address not in self._serials:
            self._serials[address] = self._num_seen
            self._num_seen += 1
            self._events.append((self._serials[address], storage.nbytes()))
            weakref.finalize(storage, self._forget, address, storage.nbytes()).atexit = False
        return self._serials[address]

    def _forget(self, address: int, num_bytes: int) -> None:
        self._events.append((self._serials.pop(address), -num_bytes))
