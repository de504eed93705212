"""Seconds of the messages around a layer's experts: tokens to ranks that hold some of theirs, and sums back.

Takes a Setting, a unit and strategies; loads are taken as even.  Knows nothing of what experts compute.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from galvatron.core.model import ENDS, UnitName

from .capacity import kept
from .communication import collective_s
from .setting import Setting
from .sizes import expert_ranks
from .strategies import Floats, Strategies

COUNT_BYTES = 8  # of how many tokens a rank sends another
ROUTE_BYTES = 8  # of an expert's number and its weight, for every expert that a token is sent to


@dataclass(frozen=True, slots=True)
class ExpertMessages:
    """Seconds of a layer's messages around experts, for one microbatch.

    Over tp: tokens and their routes gathered, sums scattered, and the adjoint of both (``_back_s``).  Over ep: how many
    go where, all-to-alls there with routes, and back.
    """

    gather_s: Floats
    scatter_s: Floats
    gather_back_s: Floats
    scatter_back_s: Floats
    counts_s: Floats
    dispatch_s: Floats
    combine_s: Floats


def expert_messages(setting: Setting, unit: UnitName, s: Strategies, batch: Floats) -> ExpertMessages:
    """Every token goes once to each rank that has some of its experts; loads are taken as even."""
    if unit in ENDS or not setting.model.spec.kind(unit).num_experts:
        return ExpertMessages(*(np.zeros(len(s)) for _ in fields(ExpertMessages)))
    kind, shares = setting.model.spec.kind(unit), kept(setting, unit, s)
    rows = batch * setting.tokens(unit) * expert_ranks(kind, s)  # of all tensor-parallel ranks
    row_bytes, route_bytes = kind.hidden_size * setting.compute_bytes, kind.experts_per_token * ROUTE_BYTES
    received = rows * np.where(s.ep > 1, shares.asked, 1.0)  # where experts are not dealt out all tokens are gathered
    hidden, routes = received * row_bytes, received * route_bytes
    gather_s, gather_routes_s = (collective_s(setting, "all_gather", s.tp, 1, n) for n in (hidden, routes))
    scatter_s, scatter_routes_s = (collective_s(setting, "reduce_scatter", s.tp, 1, n) for n in (hidden, routes))
    hidden, routes = rows * shares.own * row_bytes, rows * shares.own * route_bytes  # sent, as many or more
    both = np.where(s.ep > 1, s.tp * s.ep, 1)
    counts_s = collective_s(setting, "all_gather", both, 1, COUNT_BYTES * both * s.ep)
    if setting.model.capacity_factor is not None:  # all ranks of a stage tell how often each run chooses an expert
        runs = np.where(s.sequence_degree > 1, batch * s.ulysses * s.cp * np.where(s.cp > 1, 2, 1), 1)
        told = COUNT_BYTES * kind.num_experts * runs * setting.stage_size
        counts_s = counts_s + collective_s(setting, "all_gather", setting.stage_size, 1, told)
    return ExpertMessages(
        gather_s=gather_s + gather_routes_s,
        scatter_s=scatter_s,
        gather_back_s=scatter_s + scatter_routes_s,
        scatter_back_s=gather_s,
        counts_s=counts_s,
        dispatch_s=collective_s(setting, "all_to_all", s.ep, s.tp, (hidden + routes) / s.tp),
        combine_s=collective_s(setting, "all_to_all", s.ep, s.tp, hidden / s.tp),
    )
