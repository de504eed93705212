"""Seconds of one unit (embedding, one layer or head) under many strategies at once, split by cause.

Takes a Setting, a unit and strategies; gives times per microbatch and per step.  Knows nothing of neighbours
(redistribution) or stages (pipeline): ``step`` and ``search`` add those.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from galvatron.core.model import ENDS, RECOMPUTES, UnitName
from galvatron.plan.offload import MOMENT_BYTES
from galvatron.plan.plan import LayerStrategy

from .capacity import kept
from .communication import exposed_s
from .compute import interpolate
from .data_parallel import data_parallel_s, messages_s, replicated_bytes_s, tied_s
from .experts import expert_messages
from .sequence import attention_share, context_parallel_s, regions_s, sequence_s, tensor_parallel_s, wide_norms_s
from .setting import Setting
from .sizes import held_and_trained
from .strategies import FULL, NONE, Floats, Ints, Strategies

WEIGHT_SHARE = 0.5  # of a backward's compute: a linear's gradients of input and of weight are matmuls of equal FLOPs


@dataclass(frozen=True, slots=True)
class UnitTimes:
    """Seconds of one unit, one row a strategy; what overlaps is already left out of the communication.

    Per microbatch: compute (of the backward ``weight_s`` for gradients of weights), recompute (its collectives
    included), tensor_parallel, context_parallel (Ulysses and ring), expert_parallel, data_parallel, forward and
    backward.  Once a step: ``first_s`` with the first forward (gathers, which take ``gathers_s`` by themselves),
    ``last_s`` with the last backward (reductions, after which message it is, ``reductions_s`` after it), ``delayed_s``
    before that message, then ``replicated_s`` (uncut gradients summed over tp), ``tied_s`` and ``optimizer_s``.
    """

    compute_forward_s: Floats
    compute_backward_s: Floats
    weight_s: Floats
    recompute_s: Floats
    tensor_parallel_forward_s: Floats
    tensor_parallel_backward_s: Floats
    context_parallel_forward_s: Floats
    context_parallel_backward_s: Floats
    expert_parallel_forward_s: Floats
    expert_parallel_backward_s: Floats
    data_parallel_forward_s: Floats
    data_parallel_backward_s: Floats
    first_s: Floats
    gathers_s: Floats
    last_s: Floats
    reductions_s: Floats
    delayed_s: Floats
    replicated_s: Floats
    tied_s: Floats
    optimizer_s: Floats

    @property
    def forward_s(self) -> Floats:
        """One microbatch's forward."""
        exposed = self.tensor_parallel_forward_s + self.context_parallel_forward_s + self.expert_parallel_forward_s
        return self.compute_forward_s + exposed + self.data_parallel_forward_s

    @property
    def backward_s(self) -> Floats:
        """One microbatch's backward, recompute and weight gradients included."""
        exposed = self.tensor_parallel_backward_s + self.context_parallel_backward_s + self.expert_parallel_backward_s
        return self.compute_backward_s + self.recompute_s + exposed + self.data_parallel_backward_s

    def work_s(self, setting: Setting) -> Floats:
        """One microbatch's seconds with its share of what comes once a step: the additive objective's currency.

        A pipeline of equal stages takes ``Setting.slots`` times one stage's microbatch: m of them, and what each
        other stage adds while it fills.  All stages gather before their first microbatch and reduce after their last
        message at once, so a step waits for one stage's.  What FSDP2 puts before the last message delays every stage
        after it, so a step waits for that of all pp stages.

        Under zero bubble a stage adds forward + backward - weight, less what of the weight passes of others fits
        beside its forwards (ZB-H1, Qi et al. 2024, for passes of unequal length), in chunks of a model that of one; its
        reductions delay no other stage.
        """
        microbatch_s, in_series_s = self.forward_s + self.backward_s, self.delayed_s
        at_once_s = self.first_s + self.replicated_s + self.tied_s + self.optimizer_s
        if setting.schedule == "zero_bubble":
            hidden_s = setting.weights_in_bubble * np.minimum(self.weight_s, self.forward_s)
            fill_s = (microbatch_s - self.weight_s - hidden_s) / setting.model_chunks
            # stages end together, so that of those which reduce after their message none does so while another computes
            at_once_s, in_series_s = at_once_s + self.reductions_s + self.delayed_s, 0.0 * self.delayed_s
        else:
            fill_s = setting.fill * microbatch_s
            at_once_s = at_once_s + self.last_s
        others_s = (setting.pp - 1) * fill_s + setting.pp * in_series_s
        work_s: Floats = (setting.num_microbatches * microbatch_s + others_s + at_once_s) / setting.slots
        return work_s

    def row(self, row: int) -> UnitTimes:
        """The times of one strategy, as arrays without dimensions."""
        return UnitTimes(*(getattr(self, field.name)[row] for field in fields(self)))


OF_PARAMETERS = (
    "recompute_s", "data_parallel_forward_s", "data_parallel_backward_s", "first_s", "gathers_s", "last_s",
    "reductions_s", "delayed_s", "replicated_s", "tied_s", "optimizer_s",
)  # fmt: skip
"""What of ``UnitTimes`` follows from how parameters are kept, and from recompute."""


def unit_times(setting: Setting, unit: UnitName, strategy: LayerStrategy, layers: range | None = None) -> UnitTimes:
    """Times of ``unit`` under one strategy; raises ProfileError when a measurement is missing."""
    return all_unit_times(setting, unit, Strategies.of([strategy]), layers).row(0)


def all_unit_times(setting: Setting, unit: UnitName, strategies: Strategies, layers: range | None = None) -> UnitTimes:
    """Times of ``unit`` under every strategy; raises ProfileError when a measurement is missing.

    ``layers``: of a pipeline's embedding with the parameters that a stage with these has (``Setting.parameters``).
    """
    s, (cuts, which) = strategies, strategies.cuts
    if setting.model.spec.is_idle(unit):
        return UnitTimes(*(np.zeros(len(s)) for _ in fields(UnitTimes)))
    passes, again_s = _passes_s(setting, unit, cuts)
    passes, again_s = {name: seconds[which] for name, seconds in passes.items()}, again_s[which]
    forward_s, backward_s = passes["compute_forward_s"], passes["compute_backward_s"]
    own, kept = s.parameter_cuts
    held, trained = held_and_trained(setting.parameters(unit, layers), own)
    gather_s, scatter_s, replicate_s, late_s = (m[kept] for m in messages_s(setting, unit, own, held, trained))
    messages = gather_s, scatter_s, replicate_s, late_s
    shard = data_parallel_s(setting, unit, s, messages, forward_s, backward_s + again_s, layers)
    return UnitTimes(
        **passes,
        data_parallel_forward_s=shard[0],
        data_parallel_backward_s=shard[1],
        first_s=shard[2],
        gathers_s=shard[3],
        last_s=shard[4],
        reductions_s=shard[5],
        delayed_s=shard[6],
        replicated_s=replicated_bytes_s(setting, own, *trained)[kept],
        tied_s=tied_s(setting, unit, own)[kept],
        optimizer_s=_optimizer_s(setting, s, (trained[0].held + trained[1].held)[kept]),
    )


def _passes_s(setting: Setting, unit: UnitName, s: Strategies) -> tuple[dict[str, Floats], Floats]:
    """What of ``UnitTimes`` does not depend on how parameters are kept; seconds of compute that run again."""
    batch = setting.micro_batch_size / (s.dp * s.ulysses * s.cp)
    forward_s, backward_s, again_s = _compute_s(setting, unit, s, batch)
    regions, side, nothing = regions_s(setting, unit, s, batch), setting.side_kind(unit), np.zeros(len(s))
    side_s = (nothing, nothing) if side is None else sequence_s(setting, side.name, s, batch)
    tp_forward_s, tp_backward_s = tensor_parallel_s(setting, unit, s, batch, regions)
    norms_s = wide_norms_s(setting, unit, s, batch)
    tp_forward_s, tp_backward_s = tp_forward_s + side_s[0] + norms_s, tp_backward_s + side_s[1] + norms_s
    exchange_s, ring_s, ring_back_s = context_parallel_s(setting, unit, s, batch, forward_s, backward_s)
    context_forward_s, context_backward_s = exchange_s + ring_s, exchange_s + ring_back_s
    experts = expert_messages(setting, unit, s, batch)
    beside = _share_beside_experts(setting, unit)
    dispatch_s, dispatch_back_s, dispatch_again_s = (
        exposed_s(setting, beside * compute_s, experts.dispatch_s) for compute_s in (forward_s, backward_s, again_s)
    )
    tp_forward_s = tp_forward_s + experts.gather_s + experts.scatter_s
    tp_backward_s = tp_backward_s + experts.gather_back_s + experts.scatter_back_s
    # what runs again asks again for what it takes in; sums are kept by all levels but the last, which needs all but
    # the layer's own, and that too where something follows it; experts keep nothing
    needed = unit not in ENDS and setting.model.spec.kind(unit).needs_output
    gathers_s = sum((gather_s for gather_s, _ in regions), side_s[0] + norms_s + experts.gather_s)
    if needed and setting.model.spec.kind(unit).windowed:
        gathers_s = gathers_s + regions[-1][0]
    repeated_s = gathers_s + exchange_s + experts.counts_s + dispatch_again_s
    repeated_s = (s.recompute > NONE) * (repeated_s + needed * (experts.combine_s + experts.scatter_s))
    sums = regions if _has_experts(setting, unit) or needed else regions[:-1]
    repeated_s = repeated_s + (s.recompute == FULL) * sum((scatter_s for _, scatter_s in sums), ring_s)
    reached = setting.model.spec.is_reached(unit)
    again_s, repeated_s, tp_backward_s, context_backward_s = (
        reached * seconds for seconds in (again_s, repeated_s, tp_backward_s, context_backward_s)
    )
    passes = {
        "compute_forward_s": forward_s,
        "compute_backward_s": backward_s,
        "weight_s": _weight_share(setting, unit) * backward_s,
        "recompute_s": again_s + repeated_s,
        "tensor_parallel_forward_s": tp_forward_s,
        "tensor_parallel_backward_s": tp_backward_s,
        "context_parallel_forward_s": context_forward_s,
        "context_parallel_backward_s": context_backward_s,
        "expert_parallel_forward_s": experts.counts_s + dispatch_s + experts.combine_s,
        "expert_parallel_backward_s": experts.combine_s + dispatch_back_s,
    }
    return passes, again_s


def _optimizer_s(setting: Setting, s: Strategies, elements: Ints) -> Floats:
    """AdamW's update; where moments are offloaded they come and go slice by slice, beside it on CUDA."""
    update_s = elements.astype(np.float64) * setting.model.optimizer_s_per_parameter
    if not s.offload.any():
        return update_s
    copies_s = elements * MOMENT_BYTES / setting.host_bytes_per_s
    offloaded_s = np.maximum(update_s, copies_s) if setting.overlaps else update_s + copies_s
    return np.where(s.offload > 0, offloaded_s, update_s)


def _compute_s(setting: Setting, unit: UnitName, s: Strategies, batch: Floats) -> tuple[Floats, Floats, Floats]:
    """Forward, backward and what recompute runs again, from samples at the same tp.

    Ulysses and ring ranks do the FLOPs of 1 / degree of a batch: in linears by tokens, in attention by heads and by
    blocks of scores, so they are taken as that (fractional) batch.
    """
    forward_s, backward_s, again_s = np.zeros(len(s)), np.zeros(len(s)), np.zeros(len(s))
    for tp in np.unique(s.tp):
        rows, samples = np.flatnonzero(s.tp == tp), setting.compute_samples(unit, int(tp))
        levels, level = np.unique(s.recompute[rows], return_inverse=True)
        again = [[sample.recompute_s(RECOMPUTES[at]) for at in levels] for sample in samples]
        points = [(x.batch, (x.forward_s, x.backward_s, *more)) for x, more in zip(samples, again, strict=True)]
        seconds = interpolate(points, batch[rows])
        forward_s[rows], backward_s[rows] = seconds[:, 0], seconds[:, 1]
        again_s[rows] = seconds[np.arange(len(rows)), 2 + level]
    taken = 1 - _experts_share(setting, unit) * (1 - kept(setting, unit, s).asked)
    return taken * forward_s, taken * backward_s, taken * again_s


def _experts_share(setting: Setting, unit: UnitName) -> float:
    """Which part of a layer's FLOPs its experts' products are."""
    if not _has_experts(setting, unit):
        return 0.0
    kind = setting.model.spec.kind(unit)
    return kind.share_of_experts * (1 - attention_share(kind, setting.seq_len))


def _weight_share(setting: Setting, unit: UnitName) -> float:
    """The part of a backward that zero bubble puts off: weights of linears; embedding and head put off nothing.

    Attention has no weights, and frozen ones no gradient.
    """
    if unit in ENDS:
        return 0.0
    kind = setting.model.spec.kind(unit)
    return WEIGHT_SHARE * (1 - attention_share(kind, setting.seq_len)) * kind.trained_share


def _share_beside_experts(setting: Setting, unit: UnitName) -> float:
    """Which part of a layer's compute runs while tokens travel to their experts: of its linears, shared experts."""
    if not _has_experts(setting, unit):
        return 0.0
    kind = setting.model.spec.kind(unit)
    return kind.share_beside_experts * (1 - attention_share(kind, setting.seq_len))


def _has_experts(setting: Setting, unit: UnitName) -> bool:
    return unit not in ENDS and setting.model.spec.kind(unit).num_experts > 0
