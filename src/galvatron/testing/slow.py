"""Collectives of a slow link: what waits for them is seen in the order of events, or by a clock that sees little else.

Knows nothing of models or plans.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist

SMALL_BYTES = 1024  # losses and comparisons of batches are smaller, parameters and gradients of a unit larger
SLOWED = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor")
SLOWED_SINCE_2_13 = ("reduce_scatter_single", "all_gather_single")  # FSDP2's, which are the two above by other names


class SlowWork(dist.Work):
    """Over when ``work`` is, but not before ``end``."""

    def __init__(self, work: dist.Work, end: float, waited: Callable[[], None]) -> None:
        super().__init__()
        self._work, self._end, self._waited = work, end, waited

    def wait(self, *timeout: Any) -> bool:
        """Wait for both; the rank that calls it does nothing else."""
        self._work.wait(*timeout)
        time.sleep(max(self._end - time.perf_counter(), 0.0))
        self._waited()
        return True


class SlowCollectives:
    """Within, what FSDP2 and replicas send takes ``seconds`` longer, one after the other.

    Attributes:
        events: in order: ``sum`` and ``gather`` where one was waited for, ``send`` where a message left.
    """

    def __init__(self, seconds: float) -> None:
        self.events: list[str] = []
        self._seconds, self._free_at = seconds, 0.0
        self._inside = False
        self._found = {n: getattr(dist, n) for n in (*SLOWED, *SLOWED_SINCE_2_13, "isend") if hasattr(dist, n)}

    def __enter__(self) -> Self:
        for name in self._found.keys() - {"isend"}:
            setattr(dist, name, self._slowed(self._found[name], "gather" if "gather" in name else "sum"))
        setattr(dist, "isend", self._sent)  # noqa: B010 (mypy knows a function there)
        return self

    def __exit__(self, *_: object) -> None:
        for name, found in self._found.items():
            setattr(dist, name, found)

    def _slowed(self, found: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            if self._inside or max(tensor.nbytes for tensor in tensors) <= SMALL_BYTES:
                return found(*args, async_op=async_op, **kwargs)
            self._free_at = max(self._free_at, time.perf_counter()) + self._seconds
            self._inside = True
            started = found(*args, async_op=True, **kwargs)
            self._inside = False
            work = SlowWork(started, self._free_at, lambda: self.events.append(kind))
            if async_op:
                return work
            work.wait()
            return None

        return call

    def _sent(self, *args: Any, **kwargs: Any) -> Any:
        self.events.append("send")
        return self._found["isend"](*args, **kwargs)


def before_messages(events: list[str]) -> list[str]:
    """What a rank waited for before each message, and after the last: ``sum gather send``."""
    lines, current = [], list[str]()
    for event in events:
        current.append(event)
        if event == "send":
            lines.append(" ".join(current))
            current = []
    return [*lines, " ".join(current)]
