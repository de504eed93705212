"""A training loop of your own, with your loss and optimizer: torchrun --nproc-per-node 4 examples/own_loop.py

The losses are those of plain transformers in one process: a plan says where things are computed, not what.
"""

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig

import galvatron
from galvatron import LayerStrategy, Plan
from galvatron.parallelize import init_world


def loss_fn(logits, labels):
    """Logits [tokens, vocabulary] and labels [tokens] to a loss for each token; the mean is taken for you."""
    return cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")


torch.manual_seed(0)  # the same first weights, and below the same batches, on every rank
config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4)
world, cut = init_world(), LayerStrategy(tp=2)  # a plan by hand: stages of two devices; galvatron.search finds better
stages = world.world_size // 2
sizes = {"num_microbatches": 2, "global_batch_size": 8, "seq_len": 64, "layers_per_stage": (6 // stages,) * stages}
plan = Plan(model="own", world_size=world.world_size, embedding=cut, layers=(cut,) * 6, head=cut, **sizes)
model = galvatron.parallelize(AutoModelForCausalLM.from_config(config), plan, world=world)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
text = torch.tensor(list(Path(__file__).read_bytes()))
for step in range(1, 11):
    tokens = torch.stack([text[start : start + 65] for start in torch.randint(len(text) - 64, (8,))])
    loss = model.train_step(tokens[:, :-1], tokens[:, 1:], loss_fn=loss_fn)  # the whole batch on every rank
    model.clip_grad_norm_(1.0)  # the model's own: torch's would see one rank's part of the gradients
    optimizer.step()
    if world.rank == 0:
        print(f"step {step:2d}  loss {loss:.6f}", flush=True)
model.save_pretrained("runs/own_loop")
