"""What travels in a step, counted: every message of a rank in the order in which it starts, and no clock.

Knows nothing of plans or models.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from galvatron.internals import TorchDispatchMode, tree_leaves
from galvatron.parallelize.layers.ring import INSIDE

KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "all_to_all_single": "all-to-all",
    "send": "send",
    "recv_": "receive",
}
Message = tuple[str, int]
"""Its kind, and the bytes of the larger side: what is summed, gathered, cut up, sent or received."""


class Messages(TorchDispatchMode):
    """Within, every message of this rank, in the order in which it starts."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[Message] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and note it if it is a message."""
        if func in INSIDE:
            with self:
                return INSIDE[func](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            sizes = [t.nbytes for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
            self.started.append((KINDS.get(name, name), max(sizes)))
        return result
