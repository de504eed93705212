"""Seconds of one unit (embedding, one layer or head) under one strategy, split by cause.

Takes a Setting, a unit and a strategy; gives times per microbatch and per step.  Knows nothing of neighbours
(redistribution) or stages (pipeline): ``step`` and ``search`` add those.
"""

from __future__ import annotations

from dataclasses import dataclass

from galvatron.core.model import UnitName
from galvatron.core.units import DTYPE_BYTES
from galvatron.plan.plan import LayerStrategy

from .communication import collective_s, exposed_s, tied_reduction_s
from .compute import interpolate
from .memory import MASTER_BYTES, shard_size
from .setting import Setting

REGIONS = 2  # a layer gathers its sequence for attention and for the MLP, and scatters it after each
VOCABULARY_REDUCTIONS = (1, 2)  # floats a token in each: the maximum; the sum of exponentials with the target's logit


@dataclass(frozen=True, slots=True)
class UnitTimes:
    """Seconds of one unit; what overlaps is already left out of the communication.

    Per microbatch: compute, recompute (its collectives included), tensor_parallel, data_parallel, forward and
    backward.  Once a step: ``first_s`` with the first forward (gathers), ``last_s`` with the last backward
    (reductions), then ``replicated_s`` (uncut gradients summed over tp), ``tied_s`` and ``optimizer_s``.
    """

    compute_forward_s: float
    compute_backward_s: float
    recompute_s: float
    tensor_parallel_forward_s: float
    tensor_parallel_backward_s: float
    data_parallel_forward_s: float
    data_parallel_backward_s: float
    first_s: float
    last_s: float
    replicated_s: float
    tied_s: float
    optimizer_s: float

    @property
    def forward_s(self) -> float:
        """One microbatch's forward."""
        return self.compute_forward_s + self.tensor_parallel_forward_s + self.data_parallel_forward_s

    @property
    def backward_s(self) -> float:
        """One microbatch's backward, recompute included."""
        exposed = self.tensor_parallel_backward_s + self.data_parallel_backward_s
        return self.compute_backward_s + self.recompute_s + exposed

    def work_s(self, setting: Setting) -> float:
        """One microbatch's seconds with its share of what comes once a step: the additive objective's currency.

        A pipeline of equal stages takes m + pp - 1 times one stage's microbatch.  Gathers with the first forward
        and reductions with the last backward delay every stage after them, so a step waits for those of all pp
        stages; what follows the pipeline runs on all stages at once, so it waits for one stage's.
        """
        slots = setting.num_microbatches + setting.pp - 1
        in_series_s = setting.pp * (self.first_s + self.last_s)
        at_once_s = self.replicated_s + self.tied_s + self.optimizer_s
        return self.forward_s + self.backward_s + (in_series_s + at_once_s) / slots


def unit_times(setting: Setting, unit: UnitName, strategy: LayerStrategy) -> UnitTimes:
    """Times of ``unit`` under ``strategy``; raises ProfileError when a measurement is missing."""
    batch = setting.micro_batch_size // strategy.dp
    samples = setting.compute_samples(unit, strategy.tp)
    forward_s = interpolate([(sample.batch, sample.forward_s) for sample in samples], batch)
    backward_s = interpolate([(sample.batch, sample.backward_s) for sample in samples], batch)
    tp_forward_s, tp_backward_s = _tensor_parallel_s(setting, unit, strategy.tp, batch)
    recompute_s = forward_s + tp_forward_s if strategy.recompute == "full" else 0.0
    hiding_s = backward_s + (forward_s if strategy.recompute == "full" else 0.0)
    shard = _data_parallel_s(setting, unit, strategy, forward_s, hiding_s)
    size = shard_size(setting.parameters(unit), strategy.tp, strategy.dp_shard)
    return UnitTimes(
        compute_forward_s=forward_s,
        compute_backward_s=backward_s,
        recompute_s=recompute_s,
        tensor_parallel_forward_s=tp_forward_s,
        tensor_parallel_backward_s=tp_backward_s,
        data_parallel_forward_s=shard[0],
        data_parallel_backward_s=shard[1],
        first_s=shard[2],
        last_s=shard[3],
        replicated_s=_replicated_s(setting, strategy.tp, size.uncut),
        tied_s=_tied_s(setting, unit, strategy),
        optimizer_s=size.held * setting.model.optimizer_s_per_parameter,
    )


def _tensor_parallel_s(setting: Setting, unit: UnitName, tp: int, batch: int) -> tuple[float, float]:
    """Forward and backward collectives of one microbatch: Megatron sequence parallelism (Korthikanti et al. 2022).

    Every gather of the sequence is a reduce-scatter in backward and the other way round.
    """
    tokens = batch * setting.seq_len
    hidden_bytes = tokens * setting.model.spec.hidden_size * setting.compute_bytes
    gather_s = collective_s(setting, "all_gather", tp, 1, hidden_bytes)
    scatter_s = collective_s(setting, "reduce_scatter", tp, 1, hidden_bytes)
    if unit == "layer":
        return REGIONS * (gather_s + scatter_s), REGIONS * (gather_s + scatter_s)
    if unit == "embedding":
        return scatter_s, gather_s
    token_bytes = tokens * DTYPE_BYTES["fp32"]
    loss_s = sum(collective_s(setting, "all_reduce", tp, 1, n * token_bytes) for n in VOCABULARY_REDUCTIONS)
    return gather_s + loss_s, scatter_s


def _data_parallel_s(
    setting: Setting, unit: UnitName, strategy: LayerStrategy, forward_s: float, backward_s: float
) -> tuple[float, float, float, float]:
    """Exposed (forward, backward) per microbatch and (first forward, last backward) per step."""
    size = shard_size(setting.parameters(unit), strategy.tp, strategy.dp_shard)
    padded = size.held * strategy.dp_shard
    gather_s = collective_s(setting, "all_gather", strategy.dp_shard, strategy.tp, padded * setting.compute_bytes)
    scatter_s = collective_s(setting, "reduce_scatter", strategy.dp_shard, strategy.tp, padded * setting.reduce_bytes)
    inner = strategy.tp * strategy.dp_shard
    replicate_s = collective_s(setting, "all_reduce", strategy.dp_replicate, inner, size.held * setting.reduce_bytes)
    every_gather_s = gather_s if strategy.zero == 3 else 0.0
    every_scatter_s = scatter_s if strategy.zero >= 2 else 0.0
    once_gather_s = 0.0 if strategy.zero == 3 else gather_s
    once_scatter_s = (0.0 if strategy.zero >= 2 else scatter_s) + replicate_s
    forward = exposed_s(setting, forward_s, every_gather_s)
    backward = exposed_s(setting, backward_s, every_gather_s + every_scatter_s)
    first = exposed_s(setting, forward_s, every_gather_s + once_gather_s) - forward
    last = exposed_s(setting, backward_s, every_gather_s + every_scatter_s + once_scatter_s) - backward
    return forward, backward, first, last


def _replicated_s(setting: Setting, tp: int, uncut: int) -> float:
    """The unit's part of the one all-reduce a step that sums uncut gradients over tp: its bytes, not its latency.

    The latency comes once for all units of a stage; ``step`` adds it.
    """
    return 0.0 if tp == 1 else uncut * MASTER_BYTES * setting.link("all_reduce", tp, 1).seconds_per_byte


def _tied_s(setting: Setting, unit: UnitName, strategy: LayerStrategy) -> float:
    if not setting.copies_tied_weight or unit == "layer":
        return 0.0
    spec = setting.model.spec
    tied = [p for p in setting.parameters(unit) if p.shape == (spec.vocab_size, spec.hidden_size)]
    return tied_reduction_s(setting, shard_size(tied, strategy.tp, strategy.dp_shard).held * MASTER_BYTES)
