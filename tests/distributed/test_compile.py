"""Compiled layers: the same numbers, fewer bytes, and no graph after the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.utils import counters

from galvatron.core.model import RECOMPUTES, Recompute
from galvatron.core.model_profile import ModelProfile
from galvatron.parallelize import ParallelModel, init_world, parallelize
from galvatron.parallelize.layers import compile
from galvatron.parallelize.processes.collectives import AxisGroup, gather_sequence, reduce_scatter_sequence
from galvatron.plan import LayerStrategy, Plan
from galvatron.profile import profile_model
from galvatron.testing.models import tiny_config, tiny_model
from galvatron.testing.pool import Pool

BATCH, SEQ_LEN = 4, 16
TIMEOUT_S = 900.0  # of a busy machine
S = LayerStrategy
LEVELS: tuple[Recompute, ...] = ("linears", "selective", "full", "linears")
PLANS = {
    "one device": (1, tuple(S(recompute=level) for level in LEVELS)),
    "tp": (2, tuple(S(tp=2, recompute=level) for level in LEVELS)),
    "zero bubble": (
        2,
        (
            S(tp=2, recompute="full"),
            S(dp_shard=2, zero=3, recompute="mlp"),
            S(cp=2, recompute="selective"),
            S(ulysses=2),
        ),
    ),
    "mixed": (
        2,
        (
            S(tp=2, recompute="mlp"),
            S(dp_shard=2, zero=3, recompute="mlp"),
            S(cp=2, recompute="selective"),
            S(ulysses=2),
        ),
    ),
}


def plan_of(name: str) -> Plan:
    world_size, layers = PLANS[name]
    ends = layers[-1].model_copy(update={"recompute": "none"})
    return Plan(
        model="tiny",
        world_size=world_size,
        layers_per_stage=(len(layers),),
        num_microbatches=2,
        global_batch_size=BATCH,
        seq_len=SEQ_LEN,
        embedding=ends,
        layers=layers,
        head=ends,
        schedule="zero_bubble" if name == "zero bubble" else "1f1b",
    )


@contextmanager
def backend(name: str) -> Iterator[None]:
    """The real compiler takes half a minute; what it does to graphs before it makes code takes seconds."""
    before, compile.BACKEND = compile.BACKEND, name
    try:
        yield
    finally:
        compile.BACKEND = before


def steps(name: str, compiled: bool, engine: str) -> tuple[list[float], dict[str, torch.Tensor], list[int]]:
    """Losses of two steps and an evaluation, the last gradients, and graphs made so far: warm, and after each."""
    with backend(engine):
        model = parallelize(tiny_model("llama"), plan_of(name), world=init_world("cpu"), compile=compiled)
        tokens = torch.randint(
            0, model.spec.vocab_size, (BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0)
        )
        start, losses, graphs = made(), [], []
        model.warm_up()
        graphs.append(made() - start)
        for run in (model.train_step, model.train_step, model.evaluate):
            losses.append(float(run(tokens[:, :-1], tokens[:, 1:])))
            graphs.append(made() - start)
        return losses, gradients(model), graphs


def made() -> int:
    return counters["stats"]["unique_graphs"]


def gradients(model: ParallelModel) -> dict[str, torch.Tensor]:
    return {p.name: p.tensor.grad.clone() for p in model.local_parameters if p.tensor.grad is not None}


def check(pool: Pool, name: str, engine: str) -> None:
    world_size, layers = PLANS[name]
    plain, compiled = (
        pool.run(steps, name, compiled, engine, world_size=world_size, timeout_s=TIMEOUT_S)
        for compiled in (False, True)
    )
    for (losses, expected, none), (own_losses, own, graphs) in zip(plain, compiled, strict=True):
        assert own_losses == pytest.approx(losses, rel=1e-6)
        for key, gradient in expected.items():
            assert (own[key] - gradient).abs().max() <= 3e-6 * gradient.abs().max(), key
        assert none == [0] * 4
        # one to train and one to evaluate for every strategy, all of them made when warm
        assert graphs == [2 * len(set(layers))] * 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the compiler itself does
@pytest.mark.parametrize("collective", [gather_sequence, reduce_scatter_sequence])
def test_a_compiled_collective_keeps_its_gradient(collective: Callable[..., torch.Tensor]) -> None:
    """Where a compiled function returned a view, torch 2.11 gave what is before it no gradient, and no error."""
    x, axes = torch.randn(2, 4, 8), AxisGroup(None, (2,), 0)

    def gradient(compiled: bool) -> torch.Tensor:
        weight = torch.ones(8, requires_grad=True)

        def run(weight: torch.Tensor) -> torch.Tensor:
            return collective(x * weight, axes).sin()

        step = torch.compile(run, fullgraph=True, backend="aot_eager_decomp_partition") if compiled else run
        step(weight).sum().backward()
        assert weight.grad is not None
        return weight.grad

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("tp", "mixed"))) for name in PLANS]
)
def test_compiled_layers_compute_the_same_in_graphs_made_once(pool: Pool, name: str) -> None:
    check(pool, name, "aot_eager_decomp_partition")


def profile() -> str:
    with backend("aot_eager_decomp_partition"):
        config, world = tiny_config("llama"), init_world("cpu")
        return profile_model(config, world, seq_len=SEQ_LEN, max_batch=2, budget_s=0.5, compile=True).to_json()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_is_trained_compiled_is_profiled_compiled(pool: Pool) -> None:
    measured = ModelProfile.from_json(pool.run(profile, world_size=1, timeout_s=TIMEOUT_S)[0])
    assert measured.compiled
    assert [s.batch for s in measured.compute if s.unit == "layer"] == [1, 2]
    assert all(set(s.again_s) == ({*RECOMPUTES[1:]} if s.unit == "layer" else set()) for s in measured.compute)
    kept = {s.recompute: s.bytes_per_sequence for s in measured.activations if s.unit == "layer"}
    assert [*kept] == [*RECOMPUTES]
    assert [*kept.values()] == sorted(kept.values(), reverse=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PLANS)
def test_so_do_those_of_the_real_compiler(pool: Pool, name: str) -> None:
    check(pool, name, "inductor")
