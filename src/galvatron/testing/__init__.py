"""The testbed: workers over gloo or NCCL, tiny models, plans to try and the parity certificate.

Takes a model and a plan; gives a verdict on whether the plan computes what one process computes.  Knows
nothing of costs or of how a plan was found.
"""

from .parity import ParityReport, parity
from .pool import Pool, WorkerError
from .reference import Recipe

__all__ = ["ParityReport", "Pool", "Recipe", "WorkerError", "parity"]
