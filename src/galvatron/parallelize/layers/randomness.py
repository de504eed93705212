"""What dropout draws: masks that depend on (seed, step, rank) and on nothing else that the process does.

No two ranks do the same work: between regions hidden states are cut along batch and sequence, within attention heads
are cut too, and stages have different layers.  So every rank draws masks of its own; what is computed twice is
recomputed layers alone, and ``torch.utils.checkpoint`` gives these the random state of their first run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def masks_of(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Within, the generators of the CPU and of ``device`` start from (seed, step, rank); afterwards they are as before.

    The caller's own draws (of data, say, equal on all ranks) neither change the masks nor are changed by them.
    """
    drawn = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(drawn)
        if on_gpu:
            torch.cuda.manual_seed(drawn)
        yield
