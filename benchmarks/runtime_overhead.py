"""What does a step cost beside the same step written by hand?

    python benchmarks/runtime_overhead.py --out runtime_overhead.json

The same Hugging Face LLaMA, weights and batches, float32, AdamW and clipping on gloo: one process, data parallel,
ZeRO 3, tensor parallel and 1F1B, each beside the script of ``hand_written.py``.  Both live in the same processes and
take turns (A B B A), a step at a time; CPU time of all their threads is summed over ranks, which other load on the
machine disturbs less than the clock.  Their losses must agree, and the bytes that each plan sends must equal its closed
form.  In one process a third step joins: the script with Galvatron's chunked loss, to tell what the loss alone makes of
the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import hand_written
import measure
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from galvatron.core.job import TrainSection
from galvatron.parallelize import init_world, parallelize
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing import Pool
from galvatron.testing.messages import Messages
from galvatron.train.optimizer import build_optimizer, update

WARMUP = 3
TOLERANCE = 2e-5
"""How far losses may be apart, relative; steps of AdamW magnify rounding."""
LLAMA = {"intermediate_size": 704, "vocab_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4}


@dataclass(frozen=True)
class Size:
    """Of the model and the batch."""

    hidden: int
    layers: int
    seq_len: int
    batch: int

    def model(self) -> LlamaForCausalLM:
        """The same weights every time."""
        torch.manual_seed(0)
        sizes = {"hidden_size": self.hidden, "num_hidden_layers": self.layers, "tie_word_embeddings": False}
        return LlamaForCausalLM(LlamaConfig(**LLAMA, **sizes, pad_token_id=None)).train()

    def batches(self, count: int) -> list[Tensor]:
        """Token ids [batch, seq_len]."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, self.seq_len)
        return [torch.randint(LLAMA["vocab_size"], shape, generator=generator) for _ in range(count)]


@dataclass(frozen=True)
class Case:
    """A strategy of all layers, and the script beside it."""

    strategy: LayerStrategy
    hand: Callable[[LlamaForCausalLM], hand_written.Step]
    stages: int = 1
    num_microbatches: int = 1

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.strategy.num_devices * self.stages

    def plan(self, size: Size) -> Plan:
        """What Galvatron runs."""
        per_stage = (size.layers // self.stages,) * self.stages
        return Plan(
            model="llama", world_size=self.world_size, layers_per_stage=per_stage, embedding=self.strategy,
            layers=(self.strategy,) * size.layers, head=self.strategy, num_microbatches=self.num_microbatches,
            global_batch_size=size.batch, seq_len=size.seq_len,
        )  # fmt: skip


CASES = {
    "one process": Case(LayerStrategy(), hand_written.single),
    "data parallel": Case(LayerStrategy(dp_replicate=2), hand_written.data_parallel),
    "ZeRO 3": Case(LayerStrategy(dp_shard=2, zero=3), hand_written.zero_3),
    "tensor parallel": Case(LayerStrategy(tp=2), hand_written.tensor_parallel),
    "1F1B": Case(LayerStrategy(), partial(hand_written.pipeline, num_microbatches=4), 2, 4),
}


def arguments() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=24, help="pairs of steps a case")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    return measure.options(parser)


def galvatron_step(case: Case, size: Size) -> hand_written.Step:
    """The same step as the scripts', by Galvatron."""
    model = parallelize(size.model(), case.plan(size), world=init_world("cpu"))
    section = TrainSection(
        global_batch_size=size.batch,
        seq_len=size.seq_len,
        num_steps=1,
        lr=hand_written.LR,
        betas=(0.9, 0.999),
        weight_decay=hand_written.WEIGHT_DECAY,
    )
    optimizer = build_optimizer(model.local_parameters, section)

    def step(input_ids: Tensor, labels: Tensor) -> float:
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        loss = model.train_step(input_ids, shifted)
        update(optimizer, loss, model.clip_grad_norm_(None), hand_written.MAX_NORM)
        return float(loss)

    return step


def run_case(name: str, size: Size, rounds: int) -> dict[str, Any]:
    """On every rank: CPU seconds and losses of each side by step, and bytes sent in one of Galvatron's by kind."""
    case = CASES[name]
    sides = {"hand": case.hand(size.model()), "galvatron": galvatron_step(case, size)}
    if case.world_size == 1:
        sides["hand, chunked loss"] = hand_written.single_with_chunked_loss(size.model())
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    for index, batch in enumerate(size.batches(WARMUP + rounds)):
        for side in list(sides) if index % 2 else reversed(sides):
            start = time.process_time()
            losses[side].append(sides[side](batch, batch))
            seconds[side].append(time.process_time() - start)
    with Messages() as log:
        sides["galvatron"](batch, batch)
    sent: Counter[str] = Counter()
    for kind, num_bytes in log.started:
        sent[kind] += num_bytes
    return {"cpu_s": {side: s[WARMUP:] for side, s in seconds.items()}, "losses": losses, "sent": dict(sent)}


def closed_form(case: Case, size: Size) -> list[dict[str, int]]:
    """Bytes of a step by kind, for each rank.

    Small sums of a step: the loss (with it in one message nothing else) and the gradient norm, four bytes each.
    """
    model = size.model()
    matrices = sum(p.nbytes for p in model.parameters())
    hidden = 4 * size.batch * size.seq_len * size.hidden
    numbers = {"all-reduce": 8}
    if case.stages == 2:
        return [numbers | {"send": hidden, "receive": hidden}] * 2
    if case.strategy.zero == 3:
        ends = model.model.embed_tokens.weight.nbytes + model.model.norm.weight.nbytes + model.lm_head.weight.nbytes
        return [numbers | {"all-gather": 2 * matrices - ends, "reduce-scatter": matrices}] * 2
    if case.strategy.dp_replicate == 2:
        return [{"all-reduce": 8 + matrices}] * 2
    if case.strategy.tp == 2:
        around = 2 * (2 * size.layers + 1)  # each region is entered and left, forward and backward; so are the ends
        of_loss = 4 * 4 * size.batch * size.seq_len
        norms = 4 * size.hidden * (2 * size.layers + 1)
        return [
            {"all-reduce": 8 + of_loss + norms, "all-gather": around * hidden, "reduce-scatter": around * hidden}
        ] * 2
    return [numbers]


def row(name: str, size: Size, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What a case comes to; raises AssertionError where the sides differ in their losses, or bytes in their form."""
    case = CASES[name]
    sent = [rank["sent"] for rank in found]
    assert sent == closed_form(case, size), (name, sent, closed_form(case, size))
    losses = found[0]["losses"]
    for side, values in losses.items():
        apart = max(abs(own - hand) / hand for own, hand in zip(values, losses["hand"], strict=True))
        assert apart < TOLERANCE, (name, side, apart)
    cpu_s = {
        side: [sum(step) for step in zip(*(rank["cpu_s"][side] for rank in found), strict=True)] for side in losses
    }
    ratios = {
        side: ratio([own / hand for own, hand in zip(values, cpu_s["hand"], strict=True)])
        for side, values in cpu_s.items()
        if side != "hand"
    }
    medians = {side: statistics.median(values) for side, values in cpu_s.items()}
    return {
        "case": name, "world_size": case.world_size, "median_cpu_s": medians, "ratio": ratios, "sent_bytes": sent,
        "cpu_s": cpu_s, "final_loss": {side: values[-1] for side, values in losses.items()},
    }  # fmt: skip


def ratio(values: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of steps side by side."""
    lower, middle, upper = statistics.quantiles(values, n=4)
    return {"median": middle, "lower_quartile": lower, "upper_quartile": upper}


def main() -> None:
    args = arguments()
    size = Size(args.hidden, args.layers, args.seq_len, args.batch)
    rows = []
    with Pool(timeout_s=900) as pool:
        for name in measure.tracked(args.cases, str):
            found = pool.run(run_case, name, size, args.rounds, world_size=CASES[name].world_size)
            rows.append(row(name, size, found))
    versions = {name: version(name) for name in ("torch", "transformers")}
    measure.save(args.out, rows, size=asdict(size), libraries=versions)
    table = [
        (r["case"], side, r["median_cpu_s"][side], found["median"], found["lower_quartile"], found["upper_quartile"])
        for r in rows
        for side, found in r["ratio"].items()
    ]
    columns = ("case", "side", "CPU s a step", "to hand-written", "lower quartile", "upper quartile")
    measure.show("CPU time of a step", columns, table)


if __name__ == "__main__":
    main()
