"""Experts that take no more than their capacity of a microbatch, the same choices whatever the plan.

Of a microbatch of T tokens, each sent to k of E experts, an expert takes at most C = ceil(factor x T x k / E) choices
(Lepikhin et al. 2020; Fedus et al. 2022, eq. 3), the first ones in the order of rows, positions and a token's own
choices (Megatron's "position" policy).  The others are dropped: they bring nothing and get no gradient, no message
carries them and no product has them; weights of what is kept stay.

A rank has *runs* of that order: all its rows together, or, where sequences are cut, of every row a piece, or two where
they are folded.  All ranks of a stage tell how often a run chooses each expert; what earlier runs chose is taken
already where a run begins.  Evaluations drop nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from galvatron.core.errors import ConfigError, PlanError
from galvatron.core.model import LayerKind, ModelSpec
from galvatron.internals import is_in_backward
from galvatron.models import Family, chain_of, experts_in
from galvatron.plan import LayerStrategy, Plan
from galvatron.plan.axes import StageAxes
from galvatron.plan.filling import filling_of

from ..processes.collectives import AxisGroup, all_gather
from ..processes.grid import Grid
from .experts import NOBODY, Forward, own_sums
from .forward import wrap_forward


def check_capacity(factor: float | None, model: PreTrainedModel, family: Family, spec: ModelSpec, plan: Plan) -> None:
    """Raise ConfigError or PlanError if a capacity of ``factor`` cannot be kept in ``model``; None always can."""
    if factor is None:
        return
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ConfigError(f"capacity_factor must be a finite number above 0, got {factor}; 1.25 is usual")
    links = zip(chain_of(model, family), spec.kind_of_layers(), strict=True)
    those = [(link, kind) for link, kind in links if kind.num_experts]
    if not those:
        raise ConfigError(f"capacity_factor limits experts and {spec.name} has none; leave capacity_factor out")
    if any(experts_in(model.get_submodule(link.path), link.stack) is None for link, _ in those):
        raise ConfigError(f"experts of {spec.name} are asked in a way of their own; leave capacity_factor out")
    if any(filling_of(plan, spec, kind) is not None for _, kind in those):
        raise PlanError(f"experts of {spec.name} see patches, whose order fillers break; leave capacity_factor out")


def choices_taken(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """C (see above), of a microbatch of so many tokens; exact for the decimal number that ``factor`` is written as."""
    return math.ceil(Fraction(str(factor)) * tokens * top_k / num_experts)


@dataclass(frozen=True)
class Runs:
    """Which runs of a microbatch the ranks of a stage have in layers of one strategy.

    Attributes:
        places_RN: int64 [ranks, runs], where each comes among all, from 0; all are of one length.
        stage: the ranks, and this one among them.
    """

    places_RN: Tensor
    stage: AxisGroup

    @classmethod
    def of(cls, grid: Grid, strategy: LayerStrategy) -> Self:
        """Of layers that run by ``strategy``; collective over the world."""
        degree, whole = strategy.sequence_degree, grid.plan.stage_size
        rows, pieces = (grid.plan.micro_batch_size // strategy.dp, 1 + grid.folded) if degree > 1 else (1, 1)
        places = [_places(rank, grid.axes, degree, rows, pieces) for rank in range(whole)]
        return cls(torch.tensor(places, device=grid.world.device), grid.axis_group(1, whole, purpose="capacity"))

    def taken_before(self, counts_NE: Tensor) -> Tensor:
        """[N, E] choices that this rank's N runs made → [N, E] those that all runs before each made; collective."""
        counts_ME = all_gather(counts_NE, self.stage).flatten(0, 1)
        ordered_ME = torch.zeros_like(counts_ME).index_copy_(0, self.places_RN.flatten(), counts_ME)
        return (ordered_ME.cumsum(dim=0) - ordered_ME)[self.places_RN[self.stage.rank]]


def _places(rank: int, axes: StageAxes, degree: int, rows: int, pieces: int) -> list[int]:
    first, chunk = axes.batch_chunk(rank, degree) * rows, axes.sequence_chunk(rank, degree)
    own = (chunk, 2 * degree - 1 - chunk)[:pieces]
    return [row * degree * pieces + piece for row in range(first, first + rows) for piece in own]


class Capacity:
    """What the experts of this rank's layers take, and how many choices they have dropped in a step.

    Attributes:
        factor: of an even load.
    """

    def __init__(self, factor: float, grid: Grid) -> None:
        """Collective over the world."""
        self.factor, self._plan = factor, grid.plan
        self._runs = {s: Runs.of(grid, s) for s in sorted(set(grid.plan.layers), key=str)}
        self._dropped = torch.zeros((), dtype=torch.int64, device=grid.world.device)

    def dropped(self) -> Tensor:
        """In the whole world, int64 []; collective."""
        total = self._dropped.clone()
        dist.all_reduce(total)
        return total

    def begin(self) -> None:
        """A step begins."""
        self._dropped.zero_()

    def limit(self, experts: nn.Module, kind: LayerKind, strategy: LayerStrategy) -> None:
        """Let ``experts`` of a layer, which are asked across ranks by now, take no more than their capacity."""
        number, runs = kind.num_experts, self._runs[strategy]
        tokens = self._plan.micro_batch_size * kind.tokens(self._plan.seq_len)

        def limited(forward: Forward, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                most = choices_taken(self.factor, tokens, top_k_index.shape[1], number)
                is_kept_Tk = kept(top_k_index, most, number, runs)
                if not is_in_backward():  # a layer that runs again drops the same again
                    self._dropped += is_kept_Tk.logical_not().sum()
                top_k_index = top_k_index.where(is_kept_Tk, int(NOBODY))
            return forward(hidden_states, top_k_index, top_k_weights)

        wrap_forward(experts, limited)


def without_nobody(experts: nn.Module, num_experts: int) -> None:
    """Let a module of all ``experts`` (or of a part of their width) cope with choices that no expert takes."""

    def run(forward: Forward, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return own_sums(forward, hidden_states, top_k_index, top_k_weights, num_experts)

    wrap_forward(experts, run)


def kept(index_Tk: Tensor, most: int, num_experts: int, runs: Runs) -> Tensor:
    """Bool [T, k]: which of this rank's choices their experts take; collective over the stage."""
    number = runs.places_RN.shape[1]
    run_T = torch.arange(number, device=index_Tk.device).repeat_interleave(len(index_Tk) // number)
    key_C = (run_T.unsqueeze(-1) * num_experts + index_Tk).flatten()
    counts_K = key_C.new_zeros(number * num_experts).scatter_add_(0, key_C, torch.ones_like(key_C))
    before_K = runs.taken_before(counts_K.view(number, num_experts)).flatten()
    return (before_K[key_C] + _earlier(key_C, counts_K) < most).view(index_Tk.shape)


def _earlier(key_C: Tensor, counts_K: Tensor) -> Tensor:
    """[C]: how many entries with the same key come before each; ``counts_K``: how often each key is there."""
    order_C = key_C.argsort(stable=True)
    starts_K = counts_K.cumsum(dim=0) - counts_K
    numbers_C = torch.arange(len(key_C), device=key_C.device)
    return torch.empty_like(key_C).index_copy_(0, order_C, numbers_C - starts_K[key_C[order_C]])
