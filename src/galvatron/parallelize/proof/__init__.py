"""Does the runtime compute what an unknown type of model computes?  Gradients of a tiny twin decide.

Takes a config; runs its twin whole, in stages one after the other, and cut between two threads, by the modules that
training uses, and compares losses and every gradient.  All parameters are random: at initial values a wrong cut moves
outputs by a thousandth, and trains on.
"""

from .finding import Finding
from .structures import Proof, is_known, prove, proved_structures, refuse_unproved

__all__ = ["Finding", "Proof", "is_known", "prove", "proved_structures", "refuse_unproved"]
