"""Errors to plant, one in every map that has a backward of its own and in what gradients are summed by.

A planted error makes a wrong function of the right one (``wrong``).  It is the same on all ranks, so that none waits.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from numerics import wrong
from numerics.planted_runs import BIASES, CALLS, DOCUMENTS


@dataclass(frozen=True)
class Fault:
    """``error``, in words ``planted``, of the function at ``where`` (module:attribute); the run of that name shows it.

    ``kind``: of the deviation that is the first to tell.
    """

    where: str
    planted: str
    run: str
    error: wrong.Error
    kind: str = "gradient"

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        """Put the wrong function in the place of the right one."""
        module, _, path = self.where.partition(":")
        owner: Any = importlib.import_module(f"galvatron.{module}")
        *classes, name = path.split(".")
        for part in classes:
            owner = getattr(owner, part)
        made = self.error(getattr(owner, name))
        is_static = isinstance(owner, type) and issubclass(owner, torch.autograd.Function)
        patch.setattr(owner, name, staticmethod(made) if is_static else made)


_PASSES, _OWN = "parallelize.processes.collectives:", "parallelize.processes.rows:"
_LATER, _RING, _LOSS = "parallelize.layers.later:", "parallelize.layers.ring:", "parallelize.losses.fused:"
_UNSHARDED, _STAGES = "parallelize.sharding.unsharded:", "parallelize.pipeline.passes:"
_MANY = "ulysses, ring, tp, experts"
FAULTS = (
    Fault(_PASSES + "_GatherSequence.backward", "not summed over ranks", "tp", wrong.own_positions_alone),
    Fault(_PASSES + "_ReduceScatterSequence.backward", "ranks confused", "tp", wrong.given(wrong.other_positions)),
    Fault(_PASSES + "_BatchToSequence.backward", "ranks confused", "tp", wrong.given(wrong.other_positions)),
    Fault(_PASSES + "_SequenceToBatch.backward", "ranks confused", "tp", wrong.given(wrong.other_rank_s)),
    Fault(_PASSES + "_Sum.backward", "not summed over ranks", "tp", wrong.own_alone),
    Fault("parallelize.accumulation:sum_over", "norms' gradients not summed over tp", "tp", wrong.never),
    Fault(_LOSS + "_Projected.backward", "of hidden states halved", "tp", wrong.given(wrong.half)),
    Fault(_LOSS + "_Gradients.take", "of logits halved", "tp", wrong.taken(wrong.half, 1)),
    Fault("parallelize.losses.early:EarlyGradient.closed", "the head's weight halved", "data parallel",
          wrong.given(wrong.half)),
    Fault(_UNSHARDED + "GradientSlot.add", "the last microbatch alone", "data parallel", wrong.last_microbatch_alone),
    Fault(_UNSHARDED + "UnshardedUnit._start_sum", "replicas not summed", "data parallel", wrong.never),
    Fault("train.offload:OffloadedAdamW._update_slice", "moments do not go home", "data parallel",
          wrong.taken(torch.clone, 2), "exp_avg"),
    Fault("train.offload:OffloadedAdamW._update_slice", "left out", "data parallel", wrong.never, "exp_avg"),
    Fault(_PASSES + "_Exchange.backward", "Ulysses: ranks confused", _MANY, wrong.given(wrong.other_rank_s)),
    Fault(_RING + "_attend_back", "keys' gradient one hop too far", _MANY, wrong.one_hop_too_far),
    Fault(_RING + "attend_backward", "every block by its own log-sum-exp", _MANY, wrong.own_log_sum),
    Fault(_RING + "_sink_gradient", "sinks' negated", _MANY, wrong.given(torch.neg)),
    Fault(_OWN + "_Start.backward", "dispatch: tokens confused", _MANY, wrong.of_messages(2, wrong.next_row_s, 0)),
    Fault(_OWN + "_Start.backward", "dispatch: router weights' lost", _MANY, wrong.of_messages(2, torch.zeros_like, 1)),
    Fault(_OWN + "_Start.backward", "combine: tokens confused", _MANY, wrong.of_messages(1, wrong.next_row_s, 0)),
    Fault(_OWN + "_Finish.backward", "tokens confused", _MANY, wrong.taken(wrong.next_row_s, 1)),
    Fault(_OWN + "_Add.backward", "rows of one token confused", _MANY, wrong.given(wrong.next_row_s)),
    Fault(_OWN + "_Gather.backward", "experts under tp: not summed over ranks", _MANY, wrong.own_rows_alone),
    Fault(_OWN + "_ReduceScatter.backward", "experts under tp: ranks confused", _MANY, wrong.given(wrong.other_rank_s)),
    Fault(_LATER + "_HoldInput.backward", "x of another token", "zero bubble", wrong.given(wrong.next_row_s, 1)),
    Fault(_LATER + "_HoldGradient.backward", "dy halved", "zero bubble", wrong.given(wrong.half, 2)),
    Fault(_LATER + "_Leaves.backward", "nothing left for the weight pass", "zero bubble",
          lambda right: lambda ctx, *grads: right(ctx, *(None for _ in grads))),
    Fault(_STAGES + "_Open.backward", "what a stage sends back halved", "zero bubble",
          lambda right: lambda ctx, *grads: right(ctx, *map(wrong.half, grads))),
    Fault("parallelize.losses.balance:_Balanced.backward", "logits' lost", "zero bubble", wrong.given(torch.zeros_like,
          1)),
    Fault(_STAGES + "Messages._receive_counts", "counts of the other stage lost", "zero bubble",
          wrong.given(torch.zeros_like)),
    Fault("parallelize.losses.balance:Balance.close", "counts of the other rank lost", "routers of two ranks",
          wrong.counts_of_this_rank),
    Fault("parallelize.losses.loads:Loads.move", "loads of the other rank lost", BIASES, wrong.of_this_rank, "bias"),
    Fault(_PASSES + "pad", "what fills a sequence up has a gradient", "17 patches", wrong.filled_with_ones),
    Fault(_PASSES + "_WholeSequence.backward", "not summed over ranks", "17 patches", wrong.own_positions_alone),
    Fault("parallelize.layers.sides:own_part", "the other stack's lost", "two stacks", wrong.taken(torch.detach)),
    Fault(_STAGES + "_Open.backward", "of what rides along lost", "stages of two stacks",
          wrong.taken(torch.zeros_like, 2)),
    Fault("parallelize.losses.contrast:gather_sequence", "other ranks' pairs constant", "pairs", wrong.others_constant),
    Fault("parallelize.accumulation:global_norm", "what several ranks hold counted by each", "tp",
          wrong.each_as_if_alone, "grad_norm"),
    Fault("parallelize.accumulation:Replicated.gradients", "copies within a weight not summed", "fused heads",
          wrong.without_copies),
    Fault("parallelize.accumulation:sum_over", "the other stage's copy not summed", "tied ends", wrong.never),
    Fault("parallelize.accumulation:sum_over", "the other stage's table not summed", "a table on two stages",
          wrong.never),
    Fault("parallelize.accumulation:sum_over", "a tower's not summed over tp", "a tower", wrong.never),
    Fault("parallelize.accumulation:_count_once", "what there was counted by every rank", CALLS, wrong.never),
    Fault("parallelize.accumulation:Gradients._zero_shards", "what shards had counted again", CALLS, wrong.never),
    Fault("parallelize.cutting:cut_embedding", "the padding row has a gradient", "a padding row", wrong.padding_learns),
    Fault(_LOSS + "_final_logits", "the cap has no slope", "capped scores", wrong.given(lambda _: 1.0, 1)),
    Fault(_LOSS + "_Projected.backward", "of the bias halved", "a head's bias", wrong.given(wrong.half, 2)),
    Fault(_RING + "attend_backward", "the window forgotten", "windowed ring", wrong.without_mask),
    Fault(_RING + "_attend_back", "documents forgotten", DOCUMENTS, wrong.without_documents),
    Fault("parallelize.layers.recompute:checkpoint", "another input the second time", "recompute",
          wrong.of_half_in_backward),
    Fault("parallelize.losses.balance:Balance.backward", "rows noted twice where routers run again",
          "routers of two ranks", wrong.notes_again, "loss"),
    Fault("parallelize.layers.experts:Beside._take", "shared experts constant", "shared experts",
          wrong.given(torch.detach)),
    Fault("parallelize.holding:shard_unit", "shards averaged", "data parallel",
          wrong.then(lambda face: face.set_gradient_divide_factor(2.0))),
    Fault("parallelize.pipeline.driver:prepare_backward", "replicas of shards not summed", "replicas of shards",
          wrong.shards_alone),
    Fault("parallelize.holding:whole_gradient", "products go nowhere", "shards in weight passes", wrong.kept_by_none),
    Fault("parallelize.pipeline.driver:reduce_held", "what a step's end reduces left", "shards in weight passes",
          wrong.never),
    Fault("parallelize.layers.tensor_parallel:_summed", "not summed backward", "windows", wrong.same_in_backward),
    Fault("parallelize.layers.tensor_parallel:own_part", "of all parts on every rank", "windows", wrong.of_all_parts),
    Fault("parallelize.pipeline.whole:own_part", "of all parts on every rank", "a tower", wrong.of_all_parts),
    Fault("parallelize.pipeline.whole:whole_sequence", "what a tower ends with constant", "a tower",
          wrong.given(torch.detach)),
    Fault("parallelize.layers.attention:own_heads", "the bias of scores constant", "a table on two stages",
          wrong.given(torch.detach)),
    Fault(_STAGES + "_backward", "what later stages send of another stack's lost", "states through three stages",
          wrong.hidden_alone),
    Fault(_STAGES + "_Open.backward", "of what a tower came to lost", "pairs in stages",
          wrong.taken(torch.zeros_like, 2)),
)  # fmt: skip
