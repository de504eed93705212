"""``kill -9`` at any moment of a save leaves the last good checkpoint loadable."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from galvatron.core.job import TrainSection
from galvatron.parallelize.state.pieces import LocalParameter, Piece
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.pool import PRELOAD
from galvatron.train.checkpoint import TrainState, find_checkpoint, load_checkpoint, save_checkpoint
from galvatron.train.lineage import Lineage
from galvatron.train.offload import MOMENTS
from galvatron.train.optimizer import build_optimizer

SHAPE = (512, 512)
SECTION = TrainSection(global_batch_size=1, seq_len=8, num_steps=10)
LINEAGE = Lineage(train=SECTION, config={}, eval_fraction=0.0, versions={})
ONE = LayerStrategy()
PLAN = Plan(
    model="m", world_size=1, layers_per_stage=(1,), embedding=ONE, layers=(ONE,), head=ONE,
    global_batch_size=1, seq_len=8,
)  # fmt: skip


def _model() -> SimpleNamespace:
    whole = Piece((0, 0), (0, 0), SHAPE)
    names = ("a.weight", "b.weight")
    parts = [LocalParameter(n, torch.nn.Parameter(torch.zeros(SHAPE)), SHAPE, (whole,), 1, True) for n in names]
    config = SimpleNamespace(to_json_string=lambda use_diff: "{}\n")
    return SimpleNamespace(local_parameters=parts, config=config, loss_scale=None, adapter=None)


def _tensors(model: SimpleNamespace, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    tensors = [part.tensor.data for part in model.local_parameters]
    return tensors + [optimizer.state[part.tensor][moment] for part in model.local_parameters for moment in MOMENTS]


def _save_forever(root: Path, path: list[str]) -> None:
    """Save step 1, 2, 3, ...; every value of step n is n."""
    sys.path[:] = path
    torch.set_num_threads(1)
    model = _model()
    optimizer = build_optimizer(model.local_parameters, SECTION)
    for step in range(1, 1_000_000):
        for tensor in _tensors(model, optimizer):
            tensor.fill_(step)
        repeated = step // 2  # each step is saved twice, so replacing is killed too
        state = TrainState(step=repeated, world_size=1, run=LINEAGE)
        save_checkpoint(root, model, optimizer, state, plan=PLAN, keep=2)


def _start(root: Path) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    process = context.Process(target=_save_forever, args=(root, sys.path), daemon=True)
    process.start()
    return process


def _last_good(root: Path) -> tuple[int, int]:
    """(step, value) of the latest checkpoint, all of whose values must be one number."""
    model = _model()
    optimizer = build_optimizer(model.local_parameters, SECTION)
    state = load_checkpoint(find_checkpoint(root, "latest"), model, optimizer)
    values = {value for tensor in _tensors(model, optimizer) for value in tensor.unique().tolist()}
    assert len(values) == 1, f"values of several saves in one checkpoint: {sorted(values)}"
    return state.step, int(values.pop())


@pytest.mark.parametrize("seed", range(10))
def test_kill_at_a_random_moment(tmp_path: Path, seed: int) -> None:
    root = tmp_path / "checkpoints"
    process = _start(root)
    deadline = time.monotonic() + 60
    while not (root / "latest").exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(random.Random(seed).uniform(0, 0.4))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    step, value = _last_good(root)
    assert value // 2 == step
    model = _model()
    optimizer = build_optimizer(model.local_parameters, SECTION)
    state = TrainState(step=step + 5, world_size=1, run=LINEAGE)
    save_checkpoint(root, model, optimizer, state, plan=PLAN, keep=2)
    left = sorted(path.name for path in root.iterdir())
    assert not [name for name in left if name.startswith(".")], left
    assert _last_good(root) == (step + 5, 0)
