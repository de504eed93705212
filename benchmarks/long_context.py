"""Does a sequence that no rank holds whole train as on one process?  131,072 tokens on 8 gloo processes.

    python benchmarks/long_context.py --out long_context.json

A tiny LLaMA (two layers: a ring of 8, and a ring of 4 whose ranks are pairs under Ulysses) takes one step on one
sequence.  Beside it one process does, on the unmodified Hugging Face model.  Writes JSON: losses, the worst error of
every gradient relative to its largest element, and the peak of tensor memory of every rank beside the prediction.
Ends with exit code 1 if an error is beyond the parity certificate's tolerance or a peak beyond the prediction.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import TESTS
from transformers import LlamaConfig

from galvatron.core.files import write_atomic
from galvatron.core.job import TrainSection
from galvatron.core.model_profile import ModelProfile
from galvatron.core.records import dump_json
from galvatron.cost import predict
from galvatron.models import build_spec
from galvatron.parallelize import init_world, parallelize
from galvatron.plan import LayerStrategy, Plan
from galvatron.profile.activations import count_activations
from galvatron.profile.units import UnitShape
from galvatron.testing import Pool
from galvatron.testing.compare import TOLERANCES
from galvatron.testing.models import tiny_model
from galvatron.testing.reference import mean_loss
from galvatron.train.memory import PeakMemory
from galvatron.train.optimizer import build_optimizer

sys.path.insert(0, str(TESTS.parent))
from tests.unit.profiles import make_hardware

RANKS = 8
CONFIG: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
Result = tuple[float, dict[str, torch.Tensor]]


def config(seq_len: int) -> LlamaConfig:
    return LlamaConfig(max_position_embeddings=seq_len, **CONFIG)


def plan_for(seq_len: int) -> Plan:
    ends = LayerStrategy(ulysses=RANKS)
    return Plan(
        model="tiny", world_size=RANKS, layers_per_stage=(2,), global_batch_size=1, seq_len=seq_len, embedding=ends,
        layers=(LayerStrategy(cp=RANKS), LayerStrategy(ulysses=2, cp=RANKS // 2)), head=ends,
    )  # fmt: skip


def batch(seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, CONFIG["vocab_size"], (1, seq_len + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def on_a_rank(seq_len: int) -> tuple[Result, int]:
    """Loss and gradients, whole on every rank where ZeRO shards nothing, and the peak of tensor memory."""
    memory = PeakMemory(torch.device("cpu"))
    model = parallelize(tiny_model(config(seq_len)), plan_for(seq_len), world=init_world("cpu"))
    section = TrainSection(global_batch_size=1, seq_len=seq_len, num_steps=1)
    optimizer, (ids, labels) = build_optimizer(model.local_parameters, section), batch(seq_len)
    with memory.watch(model, optimizer, [ids, labels]):
        loss = float(model.train_step(ids, labels))
    gradients = {part.name: part.tensor.grad for part in model.local_parameters if part.tensor.grad is not None}
    return (loss, gradients), memory.bytes()


def on_one_process(seq_len: int) -> Result:
    model = tiny_model(config(seq_len))
    ids, labels = batch(seq_len)
    loss = mean_loss(model, {"input_ids": ids}, labels)
    loss.backward()
    return float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def predicted_bytes(seq_len: int) -> tuple[int, int]:
    """The interval of the peak, from bytes counted on fake tensors."""
    of_model = config(seq_len)
    spec = build_spec(of_model)
    shapes = [UnitShape(of_model, spec, unit, 1, seq_len, torch.float32) for unit in spec.units]
    times = {"tp": 1, "batch": 1, "seq_len": seq_len, "forward_s": 1.0, "backward_s": 2.0}
    profile = ModelProfile(
        spec=spec, device="cpu", precision="fp32", seq_len=seq_len,
        compute=tuple({"unit": unit, **times} for unit in spec.units),  # type: ignore[arg-type]
        activations=tuple(count_activations(shape, "none") for shape in shapes),
    )  # fmt: skip
    (stage,) = predict(plan_for(seq_len), profile, make_hardware(RANKS)).stages
    return stage.low_memory_bytes, stage.peak_memory_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=131_072)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    start = time.perf_counter()
    with Pool(timeout_s=3600.0) as pool:
        ranks = pool.run(on_a_rank, given.seq_len, world_size=RANKS)
    together_s, start = time.perf_counter() - start, time.perf_counter()
    loss, gradients = on_one_process(given.seq_len)
    alone_s = time.perf_counter() - start
    low, high = predicted_bytes(given.seq_len)
    errors = {
        name: max(float((own[name] - truth).abs().max() / truth.abs().max()) for (_, own), _ in ranks)
        for name, truth in gradients.items()
    }
    loss_error = max(abs(own - loss) / loss for (own, _), _ in ranks)
    peaks, tolerances = [peak for _, peak in ranks], TOLERANCES["fp32"]
    found = {
        "seq_len": given.seq_len, "ranks": RANKS, "plan": plan_for(given.seq_len).describe().splitlines(), "loss": loss,
        "loss_error": loss_error, "gradient_errors": errors, "peak_bytes": peaks, "predicted_bytes": [low, high],
        "together_s": together_s, "alone_s": alone_s, "torch": torch.__version__,
    }  # fmt: skip
    write_atomic(given.out, dump_json(found))
    worst = max(errors.values())
    print(f"loss {loss_error:.1e}, worst gradient {worst:.1e}, peak {max(peaks):,} of {low:,} to {high:,} bytes")
    right = loss_error <= tolerances["loss"] and worst <= tolerances["gradient"]
    return 0 if right and low <= max(peaks) <= high else 1


if __name__ == "__main__":
    sys.exit(main())
