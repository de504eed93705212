"""Every rank's random generators (dropout): started from the seed, saved, and continued where that is possible.

Takes a seed, or the index of a checkpoint; changes torch's generators.  Knows nothing of models.
"""

from __future__ import annotations

import numpy as np
import torch

from galvatron.core.errors import CheckpointError
from galvatron.parallelize.ranks import rank, world_size

from .boxes import Held, whole
from .index import CheckpointIndex

RNG_PREFIX = "rng."


def random_states() -> dict[str, Held]:
    """The states of this rank's generators, by the names that checkpoints give them."""
    states = {f"{RNG_PREFIX}cpu.{rank():05d}": whole(torch.get_rng_state())}
    if torch.cuda.is_available():
        states[f"{RNG_PREFIX}cuda.{rank():05d}"] = whole(torch.cuda.get_rng_state())
    return states


def seed_rank(seed: int, step: int) -> None:
    """Start this rank's CPU and CUDA generators anew from (seed, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank()]).generate_state(1)[0]))


def continuing_random_states(index: CheckpointIndex, saved_by: int) -> tuple[dict[str, Held], str | None]:
    """Where saved states of this rank's generators are to be loaded, and a sentence on those that cannot continue.

    ``saved_by`` is the number of processes that saved them.
    """
    anew = "random states (dropout) start anew from the seed and the step"
    if saved_by != world_size():
        return {}, f"saved by {saved_by} processes, goes on with {world_size()}: {anew}"
    states = random_states()
    known = {n: held for n, held in states.items() if n in index.tensors and index.tensors[n].shape == held.shape}
    if known.keys() != states.keys():
        lost = ", ".join(sorted(states.keys() - known.keys()))
        return known, f"no {lost} of this kind of machine was saved: {anew}"
    if any(name.startswith(f"{RNG_PREFIX}cuda") for name in index.tensors) and not torch.cuda.is_available():
        return known, f"saved on GPUs, goes on without: {anew}"
    return known, None


def restore_random_states(states: dict[str, Held]) -> None:
    """Put loaded ``states`` back into the generators they are of; raises CheckpointError if one is none."""
    for name, state in states.items():
        restore = torch.set_rng_state if name.startswith(f"{RNG_PREFIX}cpu") else torch.cuda.set_rng_state
        try:
            restore(state.boxes[0].values)
        except RuntimeError as error:
            raise CheckpointError(f"{name} is no random state ({error}); resume from another checkpoint") from None
