"""What experts with a capacity take of the fullest rank's tokens (``parallelize/layers/capacity.py``).

Takes a Setting, a unit and strategies; gives shares.  Loads are taken as even: all experts of a microbatch are full
after the same token, and drop what comes behind it.  So the first ranks of a batch drop least, the first of all none
where the capacity holds its rows; ranks that share sequences drop alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from galvatron.core.model import ENDS, UnitName

from .setting import Setting
from .strategies import Floats, Strategies


@dataclass(frozen=True, slots=True)
class Kept:
    """Shares of tokens, one row a strategy: of those that the first rank routes, and of those that its experts may get.

    These are its own, or those of all ranks that experts are dealt to.
    """

    own: Floats
    asked: Floats


def kept(setting: Setting, unit: UnitName, s: Strategies) -> Kept:
    """What is kept of the tokens in ``unit``; all where experts have no capacity."""
    factor = setting.model.capacity_factor
    kind = None if unit in ENDS else setting.model.spec.kind(unit)
    if factor is None or kind is None or not kind.num_experts:
        return Kept(np.ones(len(s)), np.ones(len(s)))
    choices = setting.micro_batch_size * setting.tokens(unit) * kind.experts_per_token
    most = math.ceil(Fraction(str(factor)) * choices / kind.num_experts)
    share = most * kind.num_experts / choices  # of the microbatch
    dealt = np.maximum(s.ep / (s.ulysses * s.cp), 1.0)  # among how many parts of the batch experts are
    return Kept(np.minimum(share * s.dp, 1.0), np.minimum(share * s.dp / dealt, 1.0))
