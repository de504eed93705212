"""More to choose from, more memory and faster machines never make the best objective larger.

What the search promises of its optimum in seconds a sample, whatever the profiles: seeded random models, clusters and
limits, each changed in one way that cannot hurt.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from galvatron.core.errors import InfeasibleError
from galvatron.core.hardware import HardwareProfile
from galvatron.core.model_profile import ModelProfile
from galvatron.search import Limits, search
from unit.profiles import make_hardware, make_model, make_spec

FAST, SEEDS = 40, 400
ROUNDING = 1 + 1e-9
WORLDS = (2, 3, 4, 6, 8)
FORBIDDEN = ("ulysses", "cp", "ep", "tp", "zero", "full", "selective", "interleaved", "zero_bubble")


@dataclass(frozen=True)
class Job:
    """What is searched."""

    model: ModelProfile
    hardware: HardwareProfile
    batches: tuple[int, ...]
    memory_limit_bytes: int
    limits: Limits

    def optimum_s(self) -> float:
        """The best objective in seconds a sample; infinite where nothing fits."""
        try:
            result = search(
                self.model,
                self.hardware,
                global_batch_size=self.batches,
                memory_limit_bytes=self.memory_limit_bytes,
                limits=self.limits,
                num_candidates=1,
                baselines=False,
            )
        except InfeasibleError:
            return math.inf
        proof = result.prediction.proof
        assert proof is not None
        assert proof.gap == pytest.approx(0.0, abs=1e-9)
        return proof.objective_s / result.plan.global_batch_size


def random_job(shake: random.Random, seed: int) -> Job:
    """A made-up model on 2 to 8 devices, with memory that some plans lack and a few limits."""
    world, device = shake.choice(WORLDS), shake.choice(["cpu", "cuda"])
    spec = make_spec(shake.randint(1, 4), vocab=shake.choice([30, 1000]), tied=shake.random() < 0.4, others=seed % 3)
    model = make_model(
        spec,
        seed=seed,
        flops_per_s=10 ** shake.uniform(9, 11),
        optimizer_s_per_parameter=10 ** shake.uniform(-9, -7),
    )
    hardware = make_hardware(world, device, latency_s=10 ** shake.uniform(-6, -3), seed=seed)
    if device == "cpu":  # ranks that share cores
        slow = hardware.device.model_copy(update={"full_speed_fraction": shake.choice([1.0, 0.5, 0.3])})
        hardware = hardware.model_copy(update={"device": slow})
    runtime = 2**30 if device == "cuda" else 0  # what a process on CUDA takes besides its tensors
    memory = runtime + int(4 * spec.num_parameters * shake.uniform(1.0, 6.0)) + 2**20
    forbidden = frozenset(shake.sample(FORBIDDEN, shake.randint(0, 4)))
    limits = Limits(shake.choice(["runtime", "all"]), forbid=forbidden, at_most={"model_chunks": 2})
    return Job(model, hardware, (shake.choice([4, 6, 8]) * world,), memory, limits)


def more_memory(job: Job, shake: random.Random) -> Job:
    return replace(job, memory_limit_bytes=int(job.memory_limit_bytes * shake.uniform(1.0, 3.0)))


def more_bandwidth(job: Job, shake: random.Random) -> Job:
    rate = shake.uniform(0.1, 1.0)
    links = (k.model_copy(update={"seconds_per_byte": rate * k.seconds_per_byte}) for k in job.hardware.links)
    return replace(job, hardware=job.hardware.model_copy(update={"links": tuple(links)}))


def less_latency(job: Job, shake: random.Random) -> Job:
    rate = shake.uniform(0.1, 1.0)
    links = (k.model_copy(update={"latency_s": rate * k.latency_s}) for k in job.hardware.links)
    return replace(job, hardware=job.hardware.model_copy(update={"links": tuple(links)}))


def one_faster_link(job: Job, shake: random.Random) -> Job:
    fast, rate = shake.randrange(len(job.hardware.links)), shake.uniform(0.1, 1.0)
    update = {"seconds_per_byte": rate * job.hardware.links[fast].seconds_per_byte}
    links = (k.model_copy(update=update) if i == fast else k for i, k in enumerate(job.hardware.links))
    return replace(job, hardware=job.hardware.model_copy(update={"links": tuple(links)}))


def faster_devices(job: Job, shake: random.Random) -> Job:
    rate = shake.uniform(0.1, 1.0)
    compute = (
        s.model_copy(
            update={
                "forward_s": rate * s.forward_s,
                "backward_s": rate * s.backward_s,
                "again_s": {level: rate * again_s for level, again_s in s.again_s.items()},
            }
        )
        for s in job.model.compute
    )
    optimizer_s = rate * job.model.optimizer_s_per_parameter
    update = {"compute": tuple(compute), "optimizer_s_per_parameter": optimizer_s}
    return replace(job, model=job.model.model_copy(update=update))


def less_overlap_slowdown(job: Job, shake: random.Random) -> Job:
    overlap, share = job.hardware.overlap, shake.uniform(0.0, 1.0)
    names = ("compute_slowdown", "communication_slowdown")
    slower = overlap.model_copy(update={n: 1 + share * (getattr(overlap, n) - 1) for n in names})
    return replace(job, hardware=job.hardware.model_copy(update={"overlap": slower}))


def less_forbidden(job: Job, shake: random.Random) -> Job:
    kept = frozenset(name for name in sorted(job.limits.forbid) if shake.random() < 0.5)
    return replace(job, limits=replace(job.limits, forbid=kept))


def larger_bounds(job: Job, shake: random.Random) -> Job:
    return replace(job, limits=replace(job.limits, at_most={"model_chunks": shake.randint(2, 4)}))


def wider_space(job: Job, shake: random.Random) -> Job:
    return replace(job, limits=replace(job.limits, space="all"))


def more_batches(job: Job, shake: random.Random) -> Job:
    return replace(job, batches=(*job.batches, 12, job.batches[0] // 2, 2 * job.batches[0]))


IMPROVEMENTS: tuple[Callable[[Job, random.Random], Job], ...] = (
    more_memory,
    more_bandwidth,
    less_latency,
    one_faster_link,
    faster_devices,
    less_overlap_slowdown,
    less_forbidden,
    larger_bounds,
    wider_space,
    more_batches,
)


@pytest.mark.parametrize("seed", [pytest.param(s, marks=[pytest.mark.slow] if s >= FAST else []) for s in range(SEEDS)])
def test_what_cannot_hurt_never_makes_the_best_objective_larger(seed: int) -> None:
    shake = random.Random(seed)
    job = random_job(shake, seed)
    optimum_s = job.optimum_s()
    improvements = IMPROVEMENTS if seed >= FAST else (IMPROVEMENTS[seed % len(IMPROVEMENTS)],)
    for improve in improvements:
        assert improve(job, shake).optimum_s() <= optimum_s * ROUNDING, improve.__name__


FIXED = ({"pp": 1}, {"pp": 2}, {"tp": 2}, {"recompute": "full"}, {"zero": 1}, {"num_microbatches": 2}, {"dp_shard": 2})


@pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=[pytest.mark.slow] if s >= FAST // 4 else []) for s in range(SEEDS // 4)]
)
def test_what_is_fixed_or_bounded_is_never_faster_than_what_is_free(seed: int) -> None:
    shake = random.Random(seed)
    job = replace(random_job(shake, seed), limits=Limits("all", at_most={"model_chunks": 2}))
    if job.hardware.world_size % 2 or job.model.spec.num_layers < 2:
        job = replace(job, model=make_model(make_spec(3), seed=seed), hardware=make_hardware(4, seed=seed))
    optimum_s = job.optimum_s()
    bounded = Limits("all", at_most={"model_chunks": 2, shake.choice(["pp", "tp", "num_microbatches", "ulysses"]): 1})
    assert replace(job, limits=bounded).optimum_s() * ROUNDING >= optimum_s
    fixed = replace(job.limits, fix=shake.choice(FIXED))
    assert replace(job, limits=fixed).optimum_s() * ROUNDING >= optimum_s
