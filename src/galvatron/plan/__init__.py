"""The plan: how one model is cut over one world, layer by layer.

Takes nothing but records; gives Plan, its validation and the rank arithmetic that follows from it.
Knows nothing of costs, of torch or of how a plan was found.
"""

from .axes import StageAxes
from .copies import Copies, copied_to, copies
from .plan import LayerStrategy, Plan, Prediction, Proof, StagePrediction
from .rules import check_plan_for_job, check_runnable, check_strategy, folds_sequence

__all__ = [
    "Copies",
    "LayerStrategy",
    "Plan",
    "Prediction",
    "Proof",
    "StageAxes",
    "StagePrediction",
    "check_plan_for_job",
    "check_runnable",
    "check_strategy",
    "copied_to",
    "copies",
    "folds_sequence",
]
