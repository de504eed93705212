"""Errors to plant, one in every map that has a backward of its own, and plans of two ranks that they show in.

A planted error makes a wrong function of the right one: it drops a term, scales, forgets the other rank or confuses
the two.  It is the same on both ranks, so that neither waits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from galvatron.internals import attend, is_in_backward
from galvatron.models import freeze_parameters
from galvatron.parallelize.layers.hops import Ring
from galvatron.parallelize.processes.collectives import split
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import tiny_model

Function = Callable[..., Any]
Error = Callable[[Function], Function]
TP, DP, ZERO3 = LayerStrategy(tp=2), LayerStrategy(dp_replicate=2), LayerStrategy(dp_shard=2, zero=3)
ALONE = LayerStrategy()


def _plan(*units: LayerStrategy, stages: tuple[int, ...] = (), **changes: Any) -> Plan:
    """Of embedding, layers and head."""
    embedding, *layers, head = units
    fields = {"seq_len": 8, "num_microbatches": 2, "global_batch_size": 8, **changes}
    return Plan(
        model="x", world_size=2, layers_per_stage=stages or (len(layers),), embedding=embedding, layers=tuple(layers),
        head=head, **fields,
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A tiny model of ``family`` and a plan for it."""

    family: str
    overrides: dict[str, Any]
    plan: Plan
    freeze: tuple[str, ...] = ()

    def model(self) -> PreTrainedModel:
        """The tiny model, with what is frozen not requiring gradients."""
        model = tiny_model(self.family, **self.overrides)
        freeze_parameters(model, self.freeze)
        return model


FROZEN = ("*k_proj.bias",)  # whose true gradient is zero
BIASES = "router biases"
ROUTERS_LOSS = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
RUNS = {
    "tp": Run("olmo2", {"num_hidden_layers": 2}, _plan(TP, TP, DP, TP)),
    "data parallel": Run(
        "llama",
        {"num_hidden_layers": 2},
        _plan(ZERO3, DP, ZERO3.model_copy(update={"offload": "optimizer"}), ZERO3),
    ),
    "ulysses, ring, tp, experts": Run(
        "gpt_oss",
        {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        _plan(DP, LayerStrategy(ulysses=2, ep=2), LayerStrategy(cp=2), TP, DP),
    ),
    "zero bubble": Run(
        "mixtral", {"num_hidden_layers": 2, **ROUTERS_LOSS},
        _plan(*(ALONE,) * 4, stages=(1, 1), schedule="zero_bubble"),
    ),
    "routers of two ranks": Run(
        "mixtral", {"num_hidden_layers": 1, **ROUTERS_LOSS}, _plan(DP, LayerStrategy(ep=2, dp_replicate=2), DP)
    ),
    "17 patches": Run("vit", {"num_hidden_layers": 1}, _plan(TP, TP, TP, seq_len=17), FROZEN),
    "two stacks": Run("t5", {"num_layers": 1, "num_decoder_layers": 2}, _plan(DP, DP, TP, TP, DP)),
    "stages of two stacks": Run("t5", {"num_layers": 1, "num_decoder_layers": 2}, _plan(*(ALONE,) * 5, stages=(2, 1))),
    BIASES: Run(
        "deepseek_v3", {"num_hidden_layers": 2, "num_local_experts": 16},
        _plan(DP, DP, LayerStrategy(ep=2, dp_replicate=2), DP),
    ),
    "pairs": Run("clip", {}, _plan(*(DP,) * 7, num_microbatches=1, global_batch_size=16), FROZEN),
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """``error``, in words ``planted``, of the function at ``where`` (module:attribute); the run of that name shows it.

    ``kind``: of the deviation that is the first to tell.
    """

    where: str
    planted: str
    run: str
    error: Error
    kind: str = "gradient"

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        """Put the wrong function in the place of the right one."""
        module, _, path = self.where.partition(":")
        owner: Any = importlib.import_module(f"galvatron.{module}")
        *classes, name = path.split(".")
        for part in classes:
            owner = getattr(owner, part)
        wrong = self.error(getattr(owner, name))
        patch.setattr(owner, name, staticmethod(wrong) if name == "backward" else wrong)


def _given(change: Function, place: int = 0) -> Error:
    """``change`` of the tensor, or of that at ``place``, which the right one gives."""

    def error(right: Function) -> Function:
        def wrong(*args: Any, **kwargs: Any) -> Any:
            given = right(*args, **kwargs)
            if given is None or isinstance(given, Tensor):
                return None if given is None else change(given)
            return *given[:place], change(given[place]), *given[place + 1 :]

        return wrong

    return error


def _taken(change: Function, place: int = 0) -> Error:
    """The right one of a ``change`` of its argument at ``place``."""
    return lambda right: lambda *args: right(*args[:place], change(args[place]), *args[place + 1 :])


def _half(x: Tensor) -> Tensor:
    return x / 2


def _other_rank_s(x: Tensor) -> Tensor:
    """Of two parts along the first dim, each in the other's place."""
    return x.roll(len(x) // 2, 0)


def _other_positions(x_BS: Tensor) -> Tensor:
    """The same along the second."""
    return x_BS.roll(x_BS.shape[1] // 2, 1)


def _next_row_s(x: Tensor) -> Tensor:
    return x.roll(1, 0)


def _never(_: Function) -> Function:
    return lambda *_, **__: None


def _own_alone(_: Function) -> Function:
    """This rank's gradient, without the other's of the same."""
    return lambda ctx, grad: (grad, None)


def _own_positions_alone(_: Function) -> Function:
    """This rank's gradient of its part, without the other's of the same."""
    return lambda ctx, grad: (split(grad, ctx.axes)[ctx.axes.rank], None)


def _own_rows_alone(_: Function) -> Function:
    return lambda ctx, grad: (grad.chunk(2)[ctx.axes.rank], None)


def _of_messages(parts: int, change: Function, place: int) -> Error:
    """``change`` of a gradient that comes home, of messages of so many parts."""

    def error(right: Function) -> Function:
        def wrong(*args: Any) -> Any:
            _, *grads = right(*args)
            if len(grads) == parts:
                grads[place] = change(grads[place])
            return None, *grads

        return wrong

    return error


def _own_log_sum(right: Function) -> Function:
    def wrong(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, _: Tensor, __: Tensor, scale: float, **mask: Any) -> Any:
        return right(grad, q, k, v, *attend(q, k, v, scale, **mask), scale, **mask)

    return wrong


def _one_hop_too_far(right: Function) -> Function:
    def wrong(*args: Any) -> Any:
        of_query, of_key, *others = right(*args)
        ring = Ring.of(*args[-7:])
        return of_query, of_key if ring.size == 1 else ring.pass_on(of_key).wait(), *others

    return wrong


def _filled_with_ones(right: Function) -> Function:
    return lambda x, lengths: right(x, lengths, value=float(is_in_backward()))


def _counts_of_this_rank(_: Function) -> Function:
    def wrong(_: Any, spread: Any) -> None:
        spread.total = spread.carried.clone()

    return wrong


def _of_this_rank(right: Function) -> Function:
    def wrong(loads: Any, rate: float) -> None:
        loads.stage = None
        right(loads, rate)

    return wrong


def _last_microbatch_alone(right: Function) -> Function:
    def wrong(slot: Any, gradient: Tensor) -> None:
        slot._is_filled = False
        right(slot, gradient)

    return wrong


def _others_constant(right: Function) -> Function:
    """As ``torch.distributed.all_gather`` gives it."""

    def wrong(x_1BD: Tensor, axes: Any) -> Tensor:
        gathered = right(x_1BD.detach(), axes)
        own = torch.arange(axes.size).repeat_interleave(x_1BD.shape[1]) == axes.rank
        return torch.where(own[None, :, None], x_1BD.repeat(1, axes.size, 1), gathered)

    return wrong


_PASSES, _OWN = "parallelize.processes.collectives:", "parallelize.processes.rows:"
_LATER, _RING, _LOSS = "parallelize.layers.later:", "parallelize.layers.ring:", "parallelize.losses.fused:"
_UNSHARDED, _STAGES = "parallelize.sharding.unsharded:", "parallelize.pipeline.passes:"
_MANY = "ulysses, ring, tp, experts"
FAULTS = (
    Fault(_PASSES + "_GatherSequence.backward", "not summed over ranks", "tp", _own_positions_alone),
    Fault(_PASSES + "_ReduceScatterSequence.backward", "ranks confused", "tp", _given(_other_positions)),
    Fault(_PASSES + "_BatchToSequence.backward", "ranks confused", "tp", _given(_other_positions)),
    Fault(_PASSES + "_SequenceToBatch.backward", "ranks confused", "tp", _given(_other_rank_s)),
    Fault(_PASSES + "_Sum.backward", "not summed over ranks", "tp", _own_alone),
    Fault("parallelize.accumulation:sum_over", "norms' gradients not summed over tp", "tp", _never),
    Fault(_LOSS + "_Projected.backward", "of hidden states halved", "tp", _given(_half)),
    Fault(_LOSS + "_Gradients.take", "of logits halved", "tp", _taken(_half, 1)),
    Fault("parallelize.losses.early:EarlyGradient.closed", "the head's weight halved", "data parallel", _given(_half)),
    Fault(_UNSHARDED + "GradientSlot.add", "the last microbatch alone", "data parallel", _last_microbatch_alone),
    Fault(_UNSHARDED + "UnshardedUnit._start_sum", "replicas not summed", "data parallel", _never),
    Fault("train.offload:OffloadedAdamW._update_slice", "moments do not go home", "data parallel",
          _taken(torch.clone, 2), "exp_avg"),
    Fault("train.offload:OffloadedAdamW._update_slice", "left out", "data parallel", _never, "exp_avg"),
    Fault(_PASSES + "_Exchange.backward", "Ulysses: ranks confused", _MANY, _given(_other_rank_s)),
    Fault(_RING + "_attend_back", "keys' gradient one hop too far", _MANY, _one_hop_too_far),
    Fault(_RING + "attend_backward", "every block by its own log-sum-exp", _MANY, _own_log_sum),
    Fault(_RING + "_sink_gradient", "sinks' negated", _MANY, _given(torch.neg)),
    Fault(_OWN + "_Start.backward", "dispatch: tokens confused", _MANY, _of_messages(2, _next_row_s, 0)),
    Fault(_OWN + "_Start.backward", "dispatch: router weights' lost", _MANY, _of_messages(2, torch.zeros_like, 1)),
    Fault(_OWN + "_Start.backward", "combine: tokens confused", _MANY, _of_messages(1, _next_row_s, 0)),
    Fault(_OWN + "_Finish.backward", "tokens confused", _MANY, _taken(_next_row_s, 1)),
    Fault(_OWN + "_Add.backward", "rows of one token confused", _MANY, _given(_next_row_s)),
    Fault(_OWN + "_Gather.backward", "experts under tp: not summed over ranks", _MANY, _own_rows_alone),
    Fault(_OWN + "_ReduceScatter.backward", "experts under tp: ranks confused", _MANY, _given(_other_rank_s)),
    Fault(_LATER + "_HoldInput.backward", "x of another token", "zero bubble", _given(_next_row_s, 1)),
    Fault(_LATER + "_HoldGradient.backward", "dy halved", "zero bubble", _given(_half, 2)),
    Fault(_LATER + "_Leaves.backward", "nothing left for the weight pass", "zero bubble",
          lambda right: lambda ctx, *grads: right(ctx, *(None for _ in grads))),
    Fault(_STAGES + "_Open.backward", "what a stage sends back halved", "zero bubble",
          lambda right: lambda ctx, *grads: right(ctx, *map(_half, grads))),
    Fault("parallelize.losses.balance:_Balanced.backward", "logits' lost", "zero bubble", _given(torch.zeros_like, 1)),
    Fault(_STAGES + "Messages._receive_counts", "counts of the other stage lost", "zero bubble",
          _given(torch.zeros_like)),
    Fault("parallelize.losses.balance:Balance.close", "counts of the other rank lost", "routers of two ranks",
          _counts_of_this_rank),
    Fault("parallelize.losses.loads:Loads.move", "loads of the other rank lost", BIASES, _of_this_rank, "bias"),
    Fault(_PASSES + "pad", "what fills a sequence up has a gradient", "17 patches", _filled_with_ones),
    Fault(_PASSES + "_WholeSequence.backward", "not summed over ranks", "17 patches", _own_positions_alone),
    Fault("parallelize.layers.sides:own_part", "the other stack's lost", "two stacks", _taken(torch.detach)),
    Fault(_STAGES + "_Open.backward", "of what rides along lost", "stages of two stacks",
          lambda right: _taken(torch.zeros_like, 2)(right)),
    Fault("parallelize.losses.contrast:gather_sequence", "other ranks' pairs constant", "pairs", _others_constant),
)  # fmt: skip
