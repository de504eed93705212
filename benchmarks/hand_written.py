"""Training steps as one would write them by hand for one Hugging Face LLaMA and one kind of parallelism.

Each function takes the model and gives ``step(input_ids, labels)``: forward, backward, clipping, AdamW, and the loss
of the whole batch as a number, on every rank.  Labels are Hugging Face's: the input ids, which it shifts itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from galvatron.parallelize.losses.fused import projected_cross_entropy_share
from galvatron.parallelize.processes.collectives import AxisGroup

Step = Callable[[Tensor, Tensor], float]
LR, WEIGHT_DECAY, MAX_NORM = 1e-3, 0.1, 1.0


def single(model: LlamaForCausalLM) -> Step:
    """One process."""
    optimizer = adamw(model)

    def step(input_ids: Tensor, labels: Tensor) -> float:
        loss = model(input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def single_with_chunked_loss(model: LlamaForCausalLM) -> Step:
    """One process, with Galvatron's loss in place of Hugging Face's."""
    optimizer = adamw(model)

    def step(input_ids: Tensor, labels: Tensor) -> float:
        hidden = model.model(input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        scale = 1.0 / int((shifted != -100).sum())
        loss = projected_cross_entropy_share(hidden, model.lm_head.weight, shifted, 0, scale, AxisGroup(None, (), 0))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def data_parallel(model: LlamaForCausalLM) -> Step:
    """DistributedDataParallel."""
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = adamw(model)

    def step(input_ids: Tensor, labels: Tensor) -> float:
        loss = replica(own_rows(input_ids), labels=own_rows(labels), use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return mean_over_ranks(loss)

    return step


def zero_3(model: LlamaForCausalLM) -> Step:
    """FSDP2: a unit a layer, the rest in the root."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = adamw(model)

    def step(input_ids: Tensor, labels: Tensor) -> float:
        loss = model(own_rows(input_ids), labels=own_rows(labels), use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return mean_over_ranks(loss)

    return step


def tensor_parallel(model: LlamaForCausalLM) -> Step:
    """DTensor's columns and rows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns, rows = ColwiseParallel(), RowwiseParallel()
    attention = {"self_attn.q_proj": columns, "self_attn.k_proj": columns, "self_attn.v_proj": columns}
    mlp = {"mlp.gate_proj": columns, "mlp.up_proj": columns, "mlp.down_proj": rows}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, {**attention, "self_attn.o_proj": rows, **mlp})
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, ends)
    optimizer = adamw(model)
    cut = [p for p in model.parameters() if isinstance(p, DTensor)]
    whole = [p for p in model.parameters() if not isinstance(p, DTensor)]

    def step(input_ids: Tensor, labels: Tensor) -> float:
        loss = model(input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        of_cut = nn.utils.get_total_norm(p.grad for p in cut)
        norm = (of_cut.full_tensor() ** 2 + nn.utils.get_total_norm(p.grad for p in whole) ** 2).sqrt()
        for parameters in (cut, whole):
            nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


class Half(nn.Module):
    """One of two stages."""

    def __init__(self, model: LlamaForCausalLM, stage: int) -> None:
        super().__init__()
        middle = len(model.model.layers) // 2
        self.embedding = None if stage else model.model.embed_tokens
        self.rotary = model.model.rotary_emb
        self.layers = model.model.layers[middle:] if stage else model.model.layers[:middle]
        self.norm, self.head = (model.model.norm, model.lm_head) if stage else (None, None)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.embedding is not None:
            hidden = self.embedding(hidden)
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        rotated = self.rotary(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, position_ids=positions, position_embeddings=rotated)
        return hidden if self.head is None else self.head(self.norm(hidden))


def pipeline(model: LlamaForCausalLM, num_microbatches: int) -> Step:
    """1F1B over two ranks by torch.distributed.pipelining."""
    rank = dist.get_rank()
    module = Half(model, rank)
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), shifted.flatten())

    schedule = Schedule1F1B(stage, num_microbatches, loss_fn=loss_fn)
    optimizer = adamw(module)

    def step(input_ids: Tensor, labels: Tensor) -> float:
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(input_ids)
        else:
            schedule.step(target=labels, losses=losses, return_outputs=False)
        loss = torch.stack(losses).mean().detach() if losses else torch.zeros(())
        both = torch.stack([nn.utils.get_total_norm(p.grad for p in module.parameters()) ** 2, loss])
        dist.all_reduce(both)
        nn.utils.clip_grads_with_norm_(module.parameters(), MAX_NORM, both[0].sqrt())
        optimizer.step()
        optimizer.zero_grad()
        return both[1].item()

    return step


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """The fused kernel; norms do not decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)


def own_rows(batch: Tensor) -> Tensor:
    """This rank's rows of the whole batch."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def mean_over_ranks(loss: Tensor) -> float:
    """What one prints."""
    total = loss.detach()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()
