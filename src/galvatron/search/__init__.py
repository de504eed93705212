"""The search for the fastest plan that fits.

Takes a ModelProfile, a HardwareProfile and a batch; gives a Plan with its prediction, a proof and its rivals.
Knows nothing of torch, of how profiles were measured or of how plans run.
"""

from .engine import search
from .result import Counts, SearchResult, Shortfall

__all__ = ["Counts", "SearchResult", "Shortfall", "search"]
