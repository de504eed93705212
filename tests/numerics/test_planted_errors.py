"""Parity fails for an error in any backward of ours: each is planted alone, and found."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import galvatron.parallelize
from distributed.small_runs import worst_error
from galvatron.models.buffers import lasting_buffers
from galvatron.parallelize import init_world, parallelize
from galvatron.testing.compare import TOLERANCES, compare_on_rank
from galvatron.testing.pool import Pool
from galvatron.testing.reference import Recipe, train_reference
from numerics.planted import FAULTS
from numerics.planted_runs import BIASES, CALLS, DOCUMENTS, RUNS

TABLE = Path(__file__).parents[2] / "benchmarks/results/planted_errors_cpu_202611.md"
MARGIN = 100.0
"""How many tolerances a planted error is off by, at least."""
RATE = 0.25
LENGTHS = (3, 5)
"""Of the documents in a packed row."""


def of_parity(run: str, path: Path) -> dict[str, float]:
    """The worst deviation of each kind on this rank."""
    worst: dict[str, float] = {}
    for deviation in compare_on_rank(path, RUNS[run].plan).deviations:
        worst[deviation.kind] = max(worst.get(deviation.kind, 0.0), deviation.error)
    return worst


def of_biases(run: str, path: Path) -> dict[str, float]:
    """How far routers' biases are from where one process, whose biases are at ``path``, moves them."""
    model = parallelize(RUNS[run].model(), RUNS[run].plan, world=init_world("cpu"))
    model.train_step(tokens(), tokens())
    model.move_router_biases(RATE)
    wanted = torch.load(path)
    errors = [(p.tensor - wanted[p.name]).abs().max() for p in model.local_parameters if p.name in wanted]
    return {"bias": float(max(errors))}


def of_calls(run: str, _: Path) -> dict[str, float]:
    """How far gradients that two calls add up are from those of one process."""
    model = parallelize(RUNS[run].model(), RUNS[run].plan, world=init_world("cpu"))
    for nth, part in enumerate(tokens().chunk(2)):
        model.train_step(part, part, accumulate=nth > 0, num_tokens=tokens().numel())
    return {"gradient": worst_error(model, plain(run, tokens().shape[1]))}


def of_documents(run: str, _: Path) -> dict[str, float]:
    """The same of rows that are packed, where one process sees every document by itself."""
    model = parallelize(RUNS[run].model(), RUNS[run].plan, world=init_world("cpu"))
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).expand(tokens().shape).contiguous()
    model.train_step(tokens(), tokens(), position_ids=positions)
    return {"gradient": worst_error(model, plain(run, *LENGTHS))}


def plain(run: str, *lengths: int) -> PreTrainedModel:
    """Of plain transformers, with gradients of the mean over all tokens of documents of these ``lengths`` a row."""
    model, total = RUNS[run].model(), torch.zeros(())
    for part in tokens().split(lengths, dim=1):
        logits = model(part, use_cache=False).logits
        total = total + F.cross_entropy(logits.flatten(0, 1), part.flatten(), reduction="sum")
    (total / tokens().numel()).backward()
    return model


def tokens() -> Tensor:
    return torch.randint(0, 97, (8, 8), generator=torch.Generator().manual_seed(0))


def moved_biases(path: Path) -> None:
    """Of plain transformers, after one step."""
    plain = RUNS[BIASES].model()
    router = plain.model.layers[1].mlp.gate
    chosen: list[Tensor] = []
    router.register_forward_hook(lambda _, __, output: chosen.append(output[2]))
    plain(tokens(), use_cache=False)
    counts = torch.bincount(chosen[0].flatten(), minlength=16).double()
    with torch.no_grad():
        router.e_score_correction_bias += RATE * (counts.mean() - counts).sign().float()
    torch.save(lasting_buffers(plain), path)


OWN_CHECKS = {BIASES: of_biases, CALLS: of_calls, DOCUMENTS: of_documents}


def each_planted(run: str, path: Path, faults: list[int]) -> list[dict[str, float]]:
    """What this rank sees with nothing planted, and with each of ``faults``."""
    check: Callable[[str, Path], dict[str, float]] = OWN_CHECKS.get(run, of_parity)
    found = [check(run, path)]
    for index in faults:
        with pytest.MonkeyPatch.context() as patch:
            FAULTS[index].plant(patch)
            found.append(check(run, path))
    return found


@pytest.mark.parametrize("run", RUNS)
def test_every_planted_error_is_found(pool: Pool, tmp_path: Path, run: str) -> None:
    plan, path = RUNS[run].plan, tmp_path / "truth.pt"
    if run == BIASES:
        moved_biases(path)
    elif run not in OWN_CHECKS:
        recipe = Recipe(num_steps=1, num_microbatches=plan.num_microbatches)
        train_reference(RUNS[run].model(), plan.global_batch_size, plan.seq_len, recipe).save(path)
    planted = [index for index, fault in enumerate(FAULTS) if fault.run == run]
    right, *wrong = zip(*pool.run(each_planted, run, path, planted, world_size=plan.world_size), strict=True)
    limits = {**TOLERANCES["fp32"], "bias": 1e-6}
    assert all(error <= limits[kind] for seen in right for kind, error in seen.items())
    for index, seen in zip(planted, wrong, strict=True):
        fault = FAULTS[index]
        error = max(found[fault.kind] for found in seen)
        assert error > MARGIN * limits[fault.kind], f"{fault.planted} ({fault.where}) is not found: {seen}"


def test_the_table_of_results_lists_all() -> None:
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    for line, fault in zip(lines, FAULTS, strict=True):
        assert line.startswith(f"| `{fault.where}` | {fault.planted} | {fault.run} | {fault.kind} |")


def test_every_backward_of_ours_has_an_error_planted() -> None:
    for module in pkgutil.walk_packages(galvatron.parallelize.__path__, "galvatron.parallelize."):
        importlib.import_module(module.name)
    own = {f"{made.__module__.removeprefix('galvatron.')}:{made.__name__}.backward" for made in functions()}
    assert len(own) > 15
    assert own <= {fault.where for fault in FAULTS}


def functions() -> Iterator[type]:
    """Autograd functions of the runtime."""
    known = torch.autograd.Function.__subclasses__()
    inner = itertools.chain.from_iterable(made.__subclasses__() for made in known)
    return (made for made in (*known, *inner) if made.__module__.startswith("galvatron.parallelize"))
