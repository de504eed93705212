"""What a step runs, counted: dispatched operations by name, as a device would launch them, and no clock.

Knows nothing of plans or models.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from galvatron.internals import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Within, every operation of this rank that is more than a view, and what the host reads of tensors.

    Attributes:
        counts: how often each ran.
        reads: the dtype of every value that the host waited for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.reads: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and count it."""
        name = func.__name__.partition(".")[0]
        if name == "_local_scalar_dense":
            assert isinstance(args[0], Tensor)
            self.reads.append(args[0].dtype)
        elif not func.is_view and func.namespace != "profiler":
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
