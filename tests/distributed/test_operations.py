"""What a step runs beside the model's own operations: counted, so that a fat or chatty change shows without a clock."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import PreTrainedModel

from galvatron.core.job import TrainSection
from galvatron.parallelize import init_world, parallelize
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import tiny_model
from galvatron.testing.operations import Operations
from galvatron.testing.pool import Pool
from galvatron.testing.reference import mean_loss
from galvatron.train.optimizer import build_optimizer, update

ROWS, SEQ_LEN = 4, 16
GRADIENTS = Counter(copy_=9)
"""From where autograd leaves a gradient to where gradients are summed and kept."""
BEYOND = {
    "one process": (LayerStrategy(), GRADIENTS),
    "replicas": (LayerStrategy(dp_replicate=2), GRADIENTS + Counter(allreduce_=1)),
    # FSDP2's: parameters are gathered twice, by way of a flat buffer, and gradients reduced once
    "ZeRO 3": (
        LayerStrategy(dp_shard=2, zero=3),
        Counter(
            empty=4,
            all_gather_copy_in=2,
            _allgather_base_=2,
            split_with_sizes_copy=2,
            chunk_cat=1,
            _reduce_scatter_base_=1,
            copy_=1,
        ),
    ),
    # attention and MLP are entered and left, forward and backward, each time in another order of rows and positions,
    # which attention's own copy does once; two norms are summed over both ranks as parts of one message
    "tensor parallel": (
        LayerStrategy(tp=2),
        GRADIENTS
        + Counter(all_gather_into_tensor=4, reduce_scatter_tensor=4, wait_tensor=8, clone=7, _unsafe_view=3, copy_=2),
    ),
}
"""Operations of a layer, forward and backward, that plain transformers in one process does not run."""


def tokens() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids = torch.randint(0, 97, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids[:, :-1]}, ids[:, 1:]


def plain_step(model: PreTrainedModel) -> Operations:
    mean_loss(model, *tokens()).backward()
    model.zero_grad()
    with Operations() as log:
        mean_loss(model, *tokens()).backward()
    return log


def own_step(model: PreTrainedModel, strategy: LayerStrategy) -> Operations:
    """Of a second step with its update: FSDP2 prepares itself in the first."""
    layers = len(model.model.layers)
    plan = Plan(
        model="tiny", world_size=strategy.num_devices, layers_per_stage=(layers,), embedding=strategy, head=strategy,
        layers=(strategy,) * layers, global_batch_size=ROWS, seq_len=SEQ_LEN,
    )  # fmt: skip
    parallel = parallelize(model, plan, world=init_world("cpu"))
    section = TrainSection(global_batch_size=ROWS, seq_len=SEQ_LEN, num_steps=1)
    optimizer = build_optimizer(parallel.local_parameters, section)
    inputs, labels = tokens()
    for _ in range(2):
        with Operations() as log:
            loss = parallel.train_step(inputs["input_ids"], labels)
            update(optimizer, loss, parallel.clip_grad_norm_(None), 1.0)
    return log


def of_a_layer(strategy: LayerStrategy) -> tuple[Counter[str], Counter[str], list[torch.dtype]]:
    """What a layer runs beyond plain transformers' and less, and what the host reads in a step."""
    own, plain = (
        [step(tiny_model("llama", num_hidden_layers=n), *given) for n in (1, 2)]
        for step, given in ((own_step, (strategy,)), (plain_step, ()))
    )
    ours, theirs = own[1].counts - own[0].counts, plain[1].counts - plain[0].counts
    return ours - theirs, theirs - ours, own[1].reads


@pytest.mark.parametrize("name", BEYOND)
def test_a_layer_runs_what_it_must_and_the_host_waits_for_nothing(pool: Pool, name: str) -> None:
    strategy, beyond = BEYOND[name]
    for more, less, reads in pool.run(of_a_layer, strategy, world_size=strategy.num_devices):
        assert more == beyond
        assert not less
        assert set(reads) == {torch.int64}  # of the batch, which is on the host
