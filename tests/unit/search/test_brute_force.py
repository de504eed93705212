"""Search equals brute force: every plan of a small random space is enumerated from the definitions.

The enumerator shares with the search only the cost of one unit, one redistribution, one transfer and one stage's
output, and the rules of ``plan``; how they add up, what fits and what is allowed is written here a second time.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from galvatron.core.errors import InfeasibleError
from galvatron.core.hardware import HardwareProfile
from galvatron.core.model import ModelProfile, UnitName
from galvatron.cost import Setting, unit_memory, unit_times
from galvatron.cost.communication import redistribution_s, transfer_s
from galvatron.cost.memory import stage_bytes
from galvatron.plan.plan import LayerStrategy
from galvatron.plan.rules import check_strategy
from galvatron.search import search
from unit.profiles import make_hardware, make_model, make_spec

SHAPES = [  # world size, layers, global batch, profiled tp: small enough to enumerate, each with other strategies
    (2, 3, 2, (1, 2)),
    (2, 2, 4, (1, 2)),
    (2, 4, 2, (1,)),
    (4, 2, 2, (1, 2, 4)),
    (4, 2, 4, (1, 2)),
    (4, 4, 2, (1, 4)),
    (3, 3, 3, (1,)),
    (4, 3, 1, (1, 2, 4)),
]
FAST = 40
INSTANCES = 200


@pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=[pytest.mark.slow] if s >= FAST else []) for s in range(INSTANCES)]
)
def test_the_search_equals_brute_force(seed: int) -> None:
    shake = random.Random(seed)
    world, layers, batch, tps = SHAPES[seed % len(SHAPES)]
    spec = make_spec(layers, vocab=shake.choice([30, 250, 1000]), tied=shake.random() < 0.5)
    rate, optimizer = 10 ** shake.uniform(9, 11), 10 ** shake.uniform(-9, -7)
    model = make_model(spec, tps=tps, seed=seed, flops_per_s=rate, optimizer_s_per_parameter=optimizer)
    hardware = make_hardware(
        world, shake.choice(["cpu", "cuda"]), latency_s=10 ** shake.uniform(-6, -3), seed=seed, memory_bytes=2**40
    )
    if hardware.device.type == "cpu":  # ranks that share cores
        device = hardware.device.model_copy(update={"full_speed_fraction": (1.0, 0.5, 0.3)[seed // 2 % 3]})
        hardware = hardware.model_copy(update={"device": device})
    plans = list(every_plan(model, hardware, batch))
    limit = random_limit(shake, [peak for _, peak in plans], hardware.device.type)
    fitting = [objective for objective, peak in plans if fits(peak, limit, hardware.device.type)]
    if not fitting:
        with pytest.raises(InfeasibleError):
            search(model, hardware, global_batch_size=batch, memory_limit_bytes=limit)
        return
    candidates = shake.choice([1, 8])  # with one, every task but the best may be ruled out by its bound
    result = search(model, hardware, global_batch_size=batch, memory_limit_bytes=limit, num_candidates=candidates)
    prediction = result.plan.prediction
    assert prediction is not None
    assert prediction.proof is not None
    assert prediction.proof.objective_s == pytest.approx(min(fitting), rel=1e-9)
    assert prediction.proof.lower_bound_s <= min(fitting) * (1 + 1e-9)
    assert prediction.proof.gap == pytest.approx(0.0, abs=1e-9)
    assert all(stage.peak_memory_bytes <= limit for stage in prediction.stages)
    result.plan.validate(spec, world)


def random_limit(shake: random.Random, peaks: list[int], device: str) -> int:
    """Too little for any plan, just enough for some (mostly), or plenty."""
    ordered = sorted(set(peaks))
    kind = shake.random()
    if kind < 0.1:
        tensors = ordered[0] - 1
    elif kind < 0.9:
        tensors = ordered[int(shake.random() ** 2 * (len(ordered) - 1))]
    else:
        tensors = ordered[-1]
    return tensors if device == "cpu" else int(tensors * 1.03) + 2 + 2**30


def fits(peak: int, limit: int, device: str) -> bool:
    """A process on CUDA takes 1 GiB and 3% of its tensors besides them."""
    return peak <= limit if device == "cpu" else peak <= int((limit - 2**30) / 1.03)


def every_plan(model: ModelProfile, hardware: HardwareProfile, batch: int) -> Iterator[tuple[float, int]]:
    """(additive objective, tensor bytes of the fullest stage) of every plan of the space."""
    world, layers = hardware.world_size, model.spec.num_layers
    for pp in range(1, min(world, layers) + 1):
        for m in range(1, batch + 1):
            if world % pp == 0 and batch % m == 0:
                yield from plans_of(Costs(model, hardware, pp, m, batch))


class Costs:
    """Every allowed strategy of every unit at one (pp, m), with its costs looked up once."""

    def __init__(self, model: ModelProfile, hardware: HardwareProfile, pp: int, m: int, batch: int) -> None:
        self.setting = Setting(model, hardware, pp, m, batch, model.seq_len, model.precision, "fp32")
        self.pp, self.m, self.layers = pp, m, model.spec.num_layers
        self.tied = model.spec.tied_embeddings
        self.embedding, self.layer, self.head = map(self.choices, ("embedding", "layer", "head"))
        degrees = {s.tp for s, *_ in self.embedding + self.layer + self.head}
        self.move = {(a, b): redistribution_s(self.setting, a, b) for a in degrees for b in degrees}
        self.transfer = transfer_s(self.setting)
        self.beside = [stage_bytes(self.setting, stage) for stage in range(pp)]

    def choices(self, unit: UnitName) -> list[tuple[LayerStrategy, float, int, int, int]]:
        found, size = [], self.setting.stage_size
        degrees = [d for d in range(1, size + 1) if size % d == 0]
        for tp, shard, zero, recompute in itertools.product(
            self.setting.model.tp_degrees(), degrees, range(4), ("none", "full")
        ):
            if (zero == 0) != (shard == 1) or size % (tp * shard):
                continue
            replicate = size // tp // shard
            strategy = LayerStrategy.model_validate(
                {"tp": tp, "dp_shard": shard, "dp_replicate": replicate, "zero": zero, "recompute": recompute}
            )
            mb, seq = self.setting.micro_batch_size, self.setting.seq_len
            if check_strategy(strategy, unit, self.setting.model.spec, size, mb, seq) is None:
                memory = unit_memory(self.setting, unit, strategy)
                work = unit_times(self.setting, unit, strategy).work_s(self.setting)
                stays = memory.parameter_bytes + memory.gradient_bytes + memory.optimizer_bytes
                stays += memory.unsharded_bytes
                found.append((strategy, work, stays, memory.activation_bytes, memory.transient_bytes))
        return found


def plans_of(costs: Costs) -> Iterator[tuple[float, int]]:
    pp, m, layers = costs.pp, costs.m, costs.layers
    divisions = [d for d in itertools.product(range(1, layers + 1), repeat=pp) if sum(d) == layers]
    for embedding, head in itertools.product(costs.embedding, costs.head):
        a, b = embedding[0], head[0]
        if costs.tied and (a.tp, a.dp_shard, a.dp_replicate, a.zero) != (b.tp, b.dp_shard, b.dp_replicate, b.zero):
            continue
        for chain in itertools.product(costs.layer, repeat=layers):
            units = [embedding, *chain, head]
            moves = [0.0] + [2 * costs.move[p[0].tp, q[0].tp] for p, q in itertools.pairwise(units)]
            for division in divisions:
                cuts = [0, *(1 + n for n in itertools.accumulate(division))]
                cuts[-1] += 1
                spans = [range(i, j) for i, j in itertools.pairwise(cuts)]
                works = [
                    sum(units[i][1] + moves[i] for i in span) + costs.transfer * ((p > 0) + (p < pp - 1))
                    for p, span in enumerate(spans)
                ]
                path, fraction = sum(works) + (m - 1) * max(works), costs.setting.hardware.device.full_speed_fraction
                objective = max(fraction * path, m * sum(works) / pp)
                for in_flight in ([m] * pp, [min(m, pp - p) for p in range(pp)]):
                    peaks = [
                        sum(units[i][2] + held * units[i][3] for i in span)
                        + max(units[i][4] for i in span)
                        + held * costs.beside[p]
                        for p, (span, held) in enumerate(zip(spans, in_flight, strict=True))
                    ]
                    yield objective, max(peaks)
