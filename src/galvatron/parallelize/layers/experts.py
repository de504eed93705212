"""Experts across ranks, at the seam between a router and a module of experts, which stay as they are.

T tokens of hidden size H, each sent to k of E experts with k weights; routers work on a rank's own tokens.

* Under tensor parallelism every rank holds a part of the width of every expert, so it needs the tokens of all of its
  ranks, and its products are partial sums; biases of what experts give are added by the first rank alone.
* Under expert parallelism a rank holds E / ep experts whole but for that.  A token goes once to every rank that holds
  some of its experts, however many, and its sum over those comes back; tensor-parallel ranks send each their own
  tokens, to the rank with their part of the width, and gather what they received.  None is dropped: who sends how many
  to whom is told before.

What every token takes beside its experts (shared ones) runs while tokens travel, and its backward while their gradients
travel home, where a model asks its experts first (DeepSeek-V3, GLM-4.5).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from galvatron.internals import multiply_one_by_one, put_parameter

from ..processes.collectives import AxisGroup, all_gather
from ..processes.rows import (
    ExpertGroups,
    Traffic,
    add_rows,
    finish_rows,
    gather_rows,
    reduce_scatter_rows,
    send_rows,
    start_rows,
)
from .forward import wrap_forward

HERE = ExpertGroups()
"""Where experts are not dealt out."""
GROUPED_MULTIPLE = 8
"""What divides every width of a grouped product (``torch.nn.functional.grouped_mm``): rows of 16 bytes, in halves."""
NOBODY = -1.0
"""The number of an expert that none is."""

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(tokens [T, H], experts [T, k], weights [T, k]) → [T, H]."""


class Beside:
    """Runs a module on what enters the block around it when asked to, ahead of the block's own call of it.

    The block's call then gives what was made; that of another tensor runs as ever.
    """

    def __init__(self, block: nn.Module, module: nn.Module) -> None:
        self._forward: Callable[..., Tensor] = module.forward
        self._entered: Tensor | None = None
        self._made: Tensor | None = None
        wrap_forward(block, self._enter)
        module.forward = self._take

    def run(self) -> None:
        """Make the module's output now."""
        if self._entered is not None:
            self._made = self._forward(self._entered)

    def _enter(self, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._entered, self._made = hidden, None
        try:
            return forward(hidden, *args, **kwargs)
        finally:
            self._entered = self._made = None

    def _take(self, hidden: Tensor) -> Tensor:
        made, self._made = self._made, None
        return made if made is not None and hidden is self._entered else self._forward(hidden)


def share_experts(
    experts: nn.Module,
    tp: AxisGroup,
    dealt: ExpertGroups,
    cut: Collection[str] | None = None,
    beside: Beside | None = None,
) -> None:
    """Let ``experts``, already cut by ``tp`` and ``dealt`` out, take all ranks' tokens and give this rank's.

    ``cut``: the parameters that tensor parallelism cuts, by default all.  ``beside``: what runs while tokens travel.
    """
    if any(width % GROUPED_MULTIPLE for weight in experts.parameters(recurse=False) for width in weight.shape[1:]):
        multiply_one_by_one(experts)
    whole = [name for name, _ in experts.named_parameters(recurse=False) if cut is not None and name not in cut]
    if whole and tp.rank > 0:
        wrap_forward(experts, _without(experts, whole))
    if dealt.ep.size == 1:
        wrap_forward(experts, _of_cut(tp))
        return
    count: int = experts.num_experts // dealt.ep.size  # type: ignore[operator, assignment]
    experts.num_experts = count  # type: ignore[assignment]
    wrap_forward(experts, _of_dealt(tp, dealt, count, beside))


def _without(experts: nn.Module, names: list[str]) -> Callable[..., Tensor]:
    """Zeros in the place of parameters that another rank adds; gradients of zero go to them."""

    def run(forward: Forward, *args: Tensor) -> Tensor:
        own = {name: experts.get_parameter(name) for name in names}
        for name, value in own.items():
            put_parameter(experts, name, value * 0)  # type: ignore[arg-type]
        try:
            return forward(*args)
        finally:
            for name, value in own.items():
                put_parameter(experts, name, value)

    return run


def _of_cut(tp: AxisGroup) -> Callable[..., Tensor]:
    def share(forward: Forward, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routes_T2k = gather_rows(_routes(top_k_index, top_k_weights), tp)
        index_Tk, weights_Tk = _of_routes(routes_T2k, top_k_weights.dtype)
        partial_TH = forward(gather_rows(hidden_states, tp), index_Tk, weights_Tk)
        return reduce_scatter_rows(partial_TH, tp)

    return share


def _of_dealt(tp: AxisGroup, dealt: ExpertGroups, count: int, beside: Beside | None) -> Callable[..., Tensor]:
    first = dealt.ep.rank * count

    def share(forward: Forward, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        token_R, traffic, most = _addresses(top_k_index // count, tp, dealt)
        sent = hidden_states[token_R], _routes(top_k_index, top_k_weights)[token_R]
        under_way = start_rows(sent, traffic, dealt.ep)
        if beside is not None:
            beside.run()
        hidden_RH, routes_R2k = finish_rows(*under_way)
        rows, missing = len(hidden_RH), most - len(hidden_RH)
        if tp.size > 1:
            hidden_RH = gather_rows(F.pad(hidden_RH, (0, 0, 0, missing)), tp)
            routes_R2k = gather_rows(F.pad(routes_R2k, (0, 0, 0, missing), value=NOBODY), tp)
        index_Rk, weights_Rk = _of_routes(routes_R2k, top_k_weights.dtype)
        partial_RH = own_sums(forward, hidden_RH, index_Rk - first, weights_Rk, count)
        (sums_RH,) = send_rows((reduce_scatter_rows(partial_RH, tp)[:rows],), traffic.back, dealt.ep)
        return add_rows(sums_RH, token_R, len(hidden_states))

    return share


def _addresses(owner_Tk: Tensor, tp: AxisGroup, dealt: ExpertGroups) -> tuple[Tensor, Traffic, int]:
    """(which token every row to be sent is, by rank; how many rows go and come; the most that a tp rank receives)."""
    asked = owner_Tk.where(owner_Tk >= 0, dealt.ep.size)  # nobody comes after all ranks
    is_sent_Te = owner_Tk.new_zeros(len(owner_Tk), dealt.ep.size + 1).scatter_(1, asked, 1)[:, :-1]
    token_R = is_sent_Te.t().nonzero()[:, 1]
    table = all_gather(is_sent_Te.sum(dim=0), dealt.both).tolist()  # [ep x tp ranks][to ep rank]
    received = [[table[ep * tp.size + rank][dealt.ep.rank] for ep in range(dealt.ep.size)] for rank in range(tp.size)]
    traffic = Traffic(tuple(table[dealt.both.rank]), tuple(received[tp.rank]))
    return token_R, traffic, max(map(sum, received))


def own_sums(forward: Forward, hidden_RH: Tensor, index_Rk: Tensor, weights_Rk: Tensor, count: int) -> Tensor:
    """[R, H]: of every row the sum over those of its experts that are among these ``count``."""
    row_P, place_P = ((index_Rk >= 0) & (index_Rk < count)).nonzero(as_tuple=True)
    hidden_PH, index_P1, weights_P1 = hidden_RH[row_P], index_Rk[row_P, place_P, None], weights_Rk[row_P, place_P, None]
    if len(row_P) == 0:  # one that counts nothing, so that every parameter has a gradient on all ranks
        hidden_PH, index_P1, weights_P1 = (F.pad(rows, (0, 0, 0, 1)) for rows in (hidden_PH, index_P1, weights_P1))
    return add_rows(forward(hidden_PH, index_P1, weights_P1)[: len(row_P)], row_P, len(hidden_RH))


def _routes(index_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    """[T, 2k] float32, in which numbers of experts are exact: one message for both."""
    return torch.cat([weights_Tk.float(), index_Tk.float()], dim=1)


def _of_routes(routes_T2k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weights_Tk, index_Tk = routes_T2k.chunk(2, dim=1)
    return index_Tk.long(), weights_Tk.to(dtype)
