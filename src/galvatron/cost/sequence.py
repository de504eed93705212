"""Seconds of what tensor and context parallelism send of a unit's sequences, under many strategies at once.

Takes a Setting, a unit, strategies and their batch; gives seconds a microbatch.  Experts send for themselves.
"""

from __future__ import annotations

import numpy as np

from galvatron.core.model import ENDS, LayerKind, UnitName
from galvatron.core.units import DTYPE_BYTES

from .communication import collective_s, exposed_s
from .memory import MASTER_BYTES
from .setting import Setting
from .sizes import dealt_kv_heads
from .strategies import Floats, Strategies

VOCABULARY_REDUCTIONS = (1, 3)
"""Floats a token in each: the maximum; the sums of exponentials, of the target's logit and of all (for smoothing)."""


def sequence_s(setting: Setting, unit: UnitName, s: Strategies, batch: Floats) -> tuple[Floats, Floats]:
    """One gather and one scatter of a microbatch's hidden states over tp."""
    return _gather_and_scatter_s(setting, unit, s, batch * setting.cut_tokens(unit, s.sequence_degree))


def _gather_and_scatter_s(setting: Setting, unit: UnitName, s: Strategies, tokens: Floats) -> tuple[Floats, Floats]:
    hidden_bytes = tokens * setting.hidden_size(unit) * setting.compute_bytes
    gather_s = collective_s(setting, "all_gather", s.tp, 1, hidden_bytes)
    return gather_s, collective_s(setting, "reduce_scatter", s.tp, 1, hidden_bytes)


def regions_s(setting: Setting, unit: UnitName, s: Strategies, batch: Floats) -> list[tuple[Floats, Floats]]:
    """A gather and a scatter of each of a layer's regions but experts; attention in windows fills these up."""
    if unit in ENDS:
        return []
    kind, tokens = setting.model.spec.kind(unit), np.full(len(s), setting.tokens(unit))
    if kind.windowed:
        filled = np.full(len(s), kind.window_tokens(setting.seq_len))
        of_regions = [filled, *[tokens] * (kind.regions - 1)]
    else:
        of_regions = [setting.cut_tokens(unit, s.sequence_degree)] * kind.gathering_regions
    return [_gather_and_scatter_s(setting, unit, s, batch * of_region) for of_region in of_regions]


def wide_norms_s(setting: Setting, unit: UnitName, s: Strategies, batch: Floats) -> Floats:
    """What the ranks of a layer's norms over all heads tell each other in one pass: a float32 square a token."""
    if unit in ENDS or not setting.model.spec.kind(unit).wide_norms:
        return np.zeros(len(s))
    squares = batch * setting.cut_tokens(unit, s.sequence_degree) * s.tp * DTYPE_BYTES["fp32"]
    return setting.model.spec.kind(unit).wide_norms * collective_s(setting, "all_gather", s.tp, 1, squares)


def tensor_parallel_s(
    setting: Setting, unit: UnitName, s: Strategies, batch: Floats, regions: list[tuple[Floats, Floats]]
) -> tuple[Floats, Floats]:
    """Forward and backward collectives of one microbatch: Megatron sequence parallelism (Korthikanti et al. 2022).

    Every gather of the sequence is a reduce-scatter in backward and the other way round.  Without those of experts.
    Layers of windows gather it around the layer too, and what they scatter.  An embedding that sees whole sequences
    gathers again what it looked up; where it looks nothing up it takes its part of what every rank has.
    """
    whole = setting.model.spec.ends == "whole"
    gather_s, scatter_s = sequence_s(setting, unit, s, batch)
    if unit not in ENDS:
        both_s = sum((gather_s + scatter_s for gather_s, scatter_s in regions), np.zeros(len(s)))
        windowed = setting.model.spec.kind(unit).windowed
        return both_s + windowed * gather_s, both_s + windowed * scatter_s
    spec = setting.model.spec
    of_end = spec.embedding_within(range(0)) if unit == "embedding" else spec.head.parameters
    is_cut = any(p.cut is not None for p in of_end)
    if unit == "embedding":
        both_s = is_cut * (gather_s + scatter_s)
        return (both_s, both_s) if whole else (scatter_s, gather_s)
    if whole and not is_cut:
        return gather_s, scatter_s
    token_bytes = batch * setting.tokens(unit) * DTYPE_BYTES["fp32"]
    loss_s = sum((collective_s(setting, "all_reduce", s.tp, 1, n * token_bytes) for n in VOCABULARY_REDUCTIONS), 0.0)
    return gather_s + loss_s, scatter_s


def context_parallel_s(
    setting: Setting, unit: UnitName, s: Strategies, batch: Floats, forward_s: Floats, backward_s: Floats
) -> tuple[Floats, Floats, Floats]:
    """Ulysses' exchanges, in either direction (Jacobs et al. 2023); a ring forward and backward (Liu et al. 2023).

    Ulysses: one all-to-all of queries, keys and values and one of the output, and back; where layers attend to another
    stack too as many again, and one more if that has another number of tokens.  A ring passes keys and
    values on cp - 1 times while it computes on what it has; in backward also the float32 sums of their gradients.  Its
    blocks are taken to run as fast as attention in one piece.
    """
    if unit in ENDS or not ((s.ulysses > 1) | (s.cp > 1)).any():
        return np.zeros(len(s)), np.zeros(len(s)), np.zeros(len(s))
    kind = setting.model.spec.kind(unit)
    token_bytes = batch * setting.cut_tokens(unit, s.sequence_degree) * kind.head_dim * setting.compute_bytes
    heads, exchanged = kind.num_heads / s.tp, dealt_kv_heads(kind, s)

    def exchange_s(num_bytes: Floats) -> Floats:
        return collective_s(setting, "all_to_all", s.ulysses, s.tp, num_bytes)

    whole_s = exchange_s(token_bytes * (heads + 2 * exchanged)) + exchange_s(token_bytes * heads)
    if (side := setting.side_kind(unit)) is not None:
        of_side = token_bytes * side.tokens(setting.seq_len) / kind.tokens(setting.seq_len) * 2 * exchanged
        alike = side.tokens(setting.seq_len) == kind.tokens(setting.seq_len)
        entering = [token_bytes * heads + of_side] if alike else [token_bytes * heads, of_side]
        whole_s = whole_s + sum(map(exchange_s, entering), exchange_s(token_bytes * heads))
    pair, stride, passed = np.where(s.cp > 1, 2, 1), s.tp * s.ulysses, 2 * token_bytes * exchanged
    hop_s = (s.cp - 1) * collective_s(setting, "p2p", pair, stride, passed)
    gradients = passed * MASTER_BYTES / setting.compute_bytes
    hop_back_s = hop_s + (s.cp - 1) * collective_s(setting, "p2p", pair, stride, gradients)
    share = attention_share(kind, setting.seq_len)
    ring_s = exposed_s(setting, share * forward_s, hop_s)
    ring_back_s = exposed_s(setting, share * backward_s, hop_back_s)
    return whole_s, ring_s, ring_back_s


def attention_share(kind: LayerKind, seq_len: int) -> float:
    """Which part of a layer's FLOPs scores and values are."""
    attention = kind.attention_flops_per_token(seq_len) * (0.5 if kind.causal else 1.0)
    return attention / (attention + 2.0 * kind.active_parameters)
