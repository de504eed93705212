"""What a model is: ModelSpec.

A model is a chain of *units*: the ``embedding``, layers of one or more *kinds* (a T5's encoder and decoder, a
DeepSeek's dense and MoE layers), and the ``head`` (final norm, projection to the vocabulary, cross entropy).  A unit
lists its parameters and how tensor and expert parallelism cut each: enough to know every byte before launch.
"""

from .parameters import Cut, ParameterSpec, shard_dim
from .spec import Joint, ModelSpec
from .tower import Tower
from .units import LayerKind, UnitSpec
from .words import ENDS, OFFLOADS, RECOMPUTES, Offload, Origin, Precision, Recompute, ReduceDtype, UnitName

__all__ = [
    "ENDS",
    "OFFLOADS",
    "RECOMPUTES",
    "Cut",
    "Joint",
    "LayerKind",
    "ModelSpec",
    "Offload",
    "Origin",
    "ParameterSpec",
    "Precision",
    "Recompute",
    "ReduceDtype",
    "Tower",
    "UnitName",
    "UnitSpec",
    "shard_dim",
]
