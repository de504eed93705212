"""Bytes alive on a rank once the backend has let go of what it is done with."""

from __future__ import annotations

import time

from galvatron.profile.storages import StorageLog

_STILL_S = 0.2


def settled_bytes(log: StorageLog) -> int:
    """``log.live_bytes()`` after 0.2 seconds in which it did not change.

    Gloo's threads hold the tensors of a collective for a moment after it is over, on a busy machine for a long one.
    """
    live_bytes, since = log.live_bytes(), time.monotonic()
    while time.monotonic() - since < _STILL_S:
        time.sleep(_STILL_S / 20)
        if log.live_bytes() != live_bytes:
            live_bytes, since = log.live_bytes(), time.monotonic()
    return live_bytes
