"""Run any plan on an unmodified Hugging Face model.

Takes a model and a Plan inside an initialised world; gives a ParallelModel whose train_step leaves exact
gradients on this rank's shards.  Knows nothing of why a plan was chosen, of data or of optimisers.
"""

from .apply import parallelize
from .model import ParallelModel
from .processes.grid import Grid
from .processes.world import World, destroy_world, init_world
from .state.pieces import LocalParameter, Piece
from .state.weights import SafetensorsWeights, StateDictWeights

__all__ = [
    "Grid",
    "LocalParameter",
    "ParallelModel",
    "Piece",
    "SafetensorsWeights",
    "StateDictWeights",
    "World",
    "destroy_world",
    "init_world",
    "parallelize",
]
