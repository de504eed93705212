"""What a plan will take: seconds and bytes, from measured profiles.

Takes a Plan (or one unit's strategy), a ModelProfile and a HardwareProfile; gives step times with their parts
and memory per stage with its parts.  Knows nothing of torch, of how a plan is searched or of how it is run.
"""

from .memory import UnitMemory, unit_memory
from .setting import Runtime, Setting
from .step import Replay, objective_s, predict, replay
from .unit import UnitTimes, unit_times

__all__ = [
    "Replay",
    "Runtime",
    "Setting",
    "UnitMemory",
    "UnitTimes",
    "objective_s",
    "predict",
    "replay",
    "unit_memory",
    "unit_times",
]
