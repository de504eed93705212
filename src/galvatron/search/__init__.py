"""The search for the fastest plan that fits.

Takes a ModelProfile, a HardwareProfile and a batch; gives a Plan with its prediction, a proof and its rivals.
Knows nothing of torch, of how profiles were measured or of how plans run.
"""

from .baselines import FAMILIES
from .engine import search
from .limits import SPACES, Limits
from .result import Counts, SearchResult, Shortfall
from .sensitivity import Change, sensitivity, what_would_fit

__all__ = [
    "FAMILIES",
    "SPACES",
    "Change",
    "Counts",
    "Limits",
    "SearchResult",
    "Shortfall",
    "search",
    "sensitivity",
    "what_would_fit",
]
