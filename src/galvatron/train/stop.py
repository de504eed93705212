"""Asking a run to end after its current step, with a save, in place of ending it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class StopRequest:
    """The last signal that asked this process to stop; 0 until then."""

    signum: int = 0

    def set(self, signum: int, frame: FrameType | None) -> None:
        """A signal handler that remembers."""
        self.signum = signum


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """What SIGINT, SIGTERM and SIGHUP ask for, in place of what they did; an ignored signal (nohup) stays ignored."""
    request = StopRequest()
    previous = {}
    if threading.current_thread() is threading.main_thread():
        asking = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, request.set) for number in asking}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
