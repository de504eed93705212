"""Saving and loading a training run: weights, AdamW moments and where the data stood.

No generator's state is among them: order and dropout come from (seed, step), so they go on by themselves.

A save is written to ``.step-000020.tmp``, renamed to ``step-000020`` when every byte is on disk, and only
then does the file ``latest`` point to it: a killed save never damages the last good one.  All ranks must
see one shared disk.  Loading takes any plan and world size (see ``boxes``); no pickle is ever read.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from pydantic import NonNegativeInt, PositiveInt
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from galvatron.core.errors import CheckpointError, GalvatronError
from galvatron.core.files import write_atomic
from galvatron.core.records import FileRecord, dump_json, read_text
from galvatron.core.words import shown
from galvatron.parallelize.losses.scale import LossScale
from galvatron.parallelize.processes.ranks import all_gather, on_rank_zero, rank, together, world_size
from galvatron.parallelize.state.adapters import ADAPTER_CONFIG
from galvatron.parallelize.state.pieces import is_finite
from galvatron.parallelize.state.safetensors_file import fsync_directory
from galvatron.plan import Plan

from .boxes import BoxLoadPlanner, BoxSavePlanner, Held, held
from .index import INDEX_FILE, CheckpointIndex
from .interface import TrainableModel
from .lineage import Lineage
from .offload import MOMENTS, host_tensors
from .optimizer import set_update_count
from .storage import PieceReader, PieceWriter

STATE_FILE, PLAN_FILE, CONFIG_FILE, POINTER = "state.json", "plan.json", "config.json", "latest"
OPTIMIZER_PREFIX = "optimizer."
_STEP_NAME = re.compile(r"step-\d{6,18}")


class TrainState(FileRecord):
    """``state.json``: what a checkpoint holds besides tensors.

    ``step`` batches are behind it, so the data stands at sequence ``step`` × ``run.train.global_batch_size`` of
    the order that ``run.train.seed`` gives.  ``skipped_steps`` of them taught nothing, the last ``skipped_in_a_row``
    among them.  ``loss_scale`` is fp16's, of the next step.
    """

    FORMAT: ClassVar[str] = "galvatron.train_state"
    VERSION: ClassVar[int] = 2
    ERROR: ClassVar[type[GalvatronError]] = CheckpointError

    step: NonNegativeInt
    world_size: PositiveInt
    run: Lineage
    skipped_steps: NonNegativeInt = 0
    skipped_in_a_row: NonNegativeInt = 0
    loss_scale: LossScale | None = None

    def to_json(self) -> str:
        """The file's text, defaults written out: another version may have others."""
        return dump_json({"format": self.FORMAT, "version": self.VERSION, **self.model_dump(mode="json")})


def save_checkpoint(
    root: Path, model: TrainableModel, optimizer: torch.optim.Optimizer, state: TrainState, *, plan: Plan, keep: int
) -> Path:
    """Write ``root/step-NNNNNN``, point ``latest`` to it, then drop all but the ``keep`` newest checkpoints.

    A collective call.  Returns the checkpoint's directory; raises CheckpointError if the disk refuses.
    """
    final = root / f"step-{state.step:06d}"
    temporary = root / f".{final.name}.tmp"
    texts = {
        STATE_FILE: state.to_json(),
        PLAN_FILE: plan.to_json(),
        CONFIG_FILE: model.config.to_json_string(use_diff=False),
    }
    if model.adapter is not None:
        texts[ADAPTER_CONFIG] = model.adapter.json
    writer = PieceWriter(temporary)
    with _plain_errors(f"save {final}"):
        on_rank_zero(lambda: _prepare(root, temporary, texts))
        tensors = _held_state(model, optimizer, primary_only=True)
        state_dict_saver.save(
            tensors, storage_writer=writer, planner=BoxSavePlanner(), no_dist=not dist.is_initialized()
        )
        on_rank_zero(lambda: _publish(writer.index, temporary, final, keep))
    return final


def load_checkpoint(directory: Path, model: TrainableModel, optimizer: torch.optim.Optimizer) -> TrainState:
    """Fill ``model`` and ``optimizer`` from ``directory``, whatever plan and world saved it.

    A collective call.

    Raises:
        CheckpointError: a file is missing or not as it was saved, or the model is another one: nothing is loaded
            then; or what was saved holds NaN or inf.
    """
    index = together(lambda: CheckpointIndex.load(directory / INDEX_FILE))
    together(lambda: index.check(directory, part=rank(), of=world_size()))
    state = together(lambda: TrainState.load(directory / STATE_FILE))
    together(lambda: _check_model(directory, index, model))
    targets = _held_state(model, optimizer, primary_only=False)
    with _plain_errors(f"load {directory}"):
        state_dict_loader.load(
            targets,
            storage_reader=PieceReader(directory, index),
            planner=BoxLoadPlanner(),
            no_dist=not dist.is_initialized(),
        )
    together(lambda: _check_finite(directory, targets))
    set_update_count(optimizer, state.step - state.skipped_steps)
    if model.loss_scale is not None and state.loss_scale is not None:
        model.loss_scale = state.loss_scale
    return state


def read_state(directory: Path) -> TrainState:
    """What the checkpoint ``directory`` says of itself; raises CheckpointError if that is missing or damaged."""
    CheckpointIndex.load(directory / INDEX_FILE).check_heads(directory, STATE_FILE)
    return TrainState.load(directory / STATE_FILE)


def find_checkpoint(root: Path, resume: str | Path) -> Path:
    """The directory that ``resume`` means: ``"latest"`` of ``root``, a checkpoint, or a run directory's latest.

    Raises CheckpointError if there is none.
    """
    if str(resume) == POINTER:
        return _latest(root)
    path = Path(resume)
    if (path / INDEX_FILE).exists():
        return path
    for candidate in (path, path / "checkpoints"):
        if (candidate / POINTER).exists():
            return _latest(candidate)
    raise CheckpointError(f"{path} holds no checkpoint ({INDEX_FILE}); give a checkpoint, a run directory or 'latest'")


def all_checkpoints(directory: Path) -> list[Path]:
    """``directory`` if it is a checkpoint, else all of that run, by step; raises CheckpointError if there is none."""
    if (directory / INDEX_FILE).exists():
        return [directory]
    found = [path for root in (directory, directory / "checkpoints") for path in sorted(root.glob("step-*"))]
    if not found:
        raise CheckpointError(f"{directory} holds no checkpoint; give a checkpoint or a run directory")
    return found


def _latest(root: Path) -> Path:
    if not (root / POINTER).exists():
        raise CheckpointError(f"{root} holds no finished checkpoint; start without resuming")
    name = read_text(root / POINTER, CheckpointError).strip()
    if not _STEP_NAME.fullmatch(name):
        raise CheckpointError(
            f"{root / POINTER} must name a checkpoint such as step-000020, got {shown(name)}; mend it"
        )
    replaced = root / f".{name}.old"
    return replaced if replaced.exists() and not (root / name).exists() else root / name


def _held_state(model: TrainableModel, optimizer: torch.optim.Optimizer, *, primary_only: bool) -> dict[str, Held]:
    if any(tensor.is_pinned() for tensor in host_tensors(optimizer)):
        torch.cuda.synchronize()  # the last update's may still be on their way
    tensors: dict[str, Held] = {}
    for part in model.local_parameters:
        if primary_only and not part.is_primary:
            continue
        assert part.name not in tensors, f"two parts of {part.name} on one rank"
        pieces = part.primary_pieces if primary_only else part.pieces
        tensors[part.name] = held(part.global_shape, part.tensor, pieces)
        for moment in MOMENTS if part.tensor.requires_grad else ():
            name = f"{OPTIMIZER_PREFIX}{moment}.{part.name}"
            tensors[name] = held(part.global_shape, optimizer.state[part.tensor][moment], pieces)
    return tensors


def _check_finite(directory: Path, tensors: dict[str, Held]) -> None:
    for name, tensor in tensors.items():
        if not all(is_finite(box.values) for box in tensor.boxes):
            raise CheckpointError(f"{directory} was saved with NaN or inf in {name}; resume from an earlier checkpoint")


def _check_model(directory: Path, index: CheckpointIndex, model: TrainableModel) -> None:
    """Names and shapes of the checkpoint's weights must be those of the model, no more and no fewer.

    What is trained must have been so, and what is frozen too: only what was trained has moments.
    """
    saved = {name: stored.shape for name, stored in index.tensors.items() if is_weight(name)}
    shapes = {part.name: tuple(part.global_shape) for part in model.local_parameters}
    wanted = {name: shape for shapes_of_rank in all_gather(shapes) for name, shape in shapes_of_rank.items()}
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{directory} is of another model: {name} has shape {_shape(saved.get(name))} there and "
                f"{_shape(wanted.get(name))} in the model; resume with the model that was trained"
            )
    for part in model.local_parameters:
        was, is_now = f"{OPTIMIZER_PREFIX}{MOMENTS[0]}.{part.name}" in index.tensors, part.tensor.requires_grad
        if was != is_now:
            words = {True: "trained", False: "frozen"}
            raise CheckpointError(
                f"{part.name} was {words[was]} when {directory} was saved and is {words[is_now]} now; freeze the same "
                "parameters, or start a new run from the exported weights"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def is_weight(name: str) -> bool:
    """Whether a checkpoint's tensor is a model weight (not optimizer state)."""
    return not name.startswith(OPTIMIZER_PREFIX)


def _prepare(root: Path, temporary: Path, texts: dict[str, str]) -> None:
    """Clear what killed saves left in ``root``, then make ``temporary`` with its text files."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in [*root.glob(".step-*.tmp"), *root.glob(f".{POINTER}.*")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for replaced in root.glob(".step-*.old"):
        final = root / replaced.name[1 : -len(".old")]
        shutil.rmtree(replaced) if final.exists() else replaced.rename(final)
    temporary.mkdir()
    for name, text in texts.items():
        write_atomic(temporary / name, text)


def _publish(index: CheckpointIndex | None, temporary: Path, final: Path, keep: int) -> None:
    """Finish ``temporary``, put it in ``final``'s place, move the pointer, prune: in this order."""
    assert index is not None
    root = final.parent
    write_atomic(temporary / INDEX_FILE, index.to_json())
    fsync_directory(temporary)
    if final.exists():
        final.rename(root / f".{final.name}.old")  # `_latest` finds it there until the new one is in place
    temporary.rename(final)
    write_atomic(root / POINTER, f"{final.name}\n")
    fsync_directory(root)
    replaced = root / f".{final.name}.old"
    if replaced.exists():
        shutil.rmtree(replaced)
    _prune(root, final, keep)


def _prune(root: Path, newest: Path, keep: int) -> None:
    def age(path: Path) -> int:
        index = path / INDEX_FILE
        return index.stat().st_mtime_ns if index.exists() else 0

    others = [path for path in root.iterdir() if _STEP_NAME.fullmatch(path.name) and path != newest]
    for path in sorted(others, key=age, reverse=True)[keep - 1 :]:
        doomed = root / f".{path.name}.tmp"
        os.replace(path, doomed)  # a checkpoint is whole or gone, even if the removal is killed
        shutil.rmtree(doomed)


@contextmanager
def _plain_errors(doing: str) -> Iterator[None]:
    """The first failing rank's error, in place of PyTorch's collection of tracebacks."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as failures:
        failing, (error, _) = min(failures.failures.items())
        if not isinstance(error, OSError):
            raise error from None
        raise CheckpointError(f"rank {failing} could not {doing}: {error}; check the disk") from None
    except OSError as error:
        raise CheckpointError(f"could not {doing}: {error}; check the disk") from None
