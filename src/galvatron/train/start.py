"""How a run begins: settings, model, data and checkpoint are held against each other, then the loop takes over.

Takes a model that a plan has cut, a TrainSection and a Dataset; gives a run directory.  Prints nothing: whoever
wants to see progress passes a Reporter.
"""

from __future__ import annotations

from pathlib import Path

import torch

from galvatron.core.errors import ConfigError, DataError
from galvatron.core.job import Job, TrainSection
from galvatron.parallelize.processes.ranks import communication_device, on_rank_zero, rank, together, world_size
from galvatron.plan import Plan, check_plan_for_job

from .checkpoint import POINTER, TrainState, find_checkpoint, load_checkpoint, read_state
from .data import Dataset
from .interface import Reporter, TrainableModel
from .lineage import Lineage, check_goes_on, notable_changes
from .memory import PeakMemory
from .metrics import METRICS_FILE
from .optimizer import build_optimizer
from .trainer import Trainer, TrainResult


def train(
    model: TrainableModel,
    section: TrainSection,
    dataset: Dataset,
    *,
    plan: Plan,
    run_dir: Path,
    resume: str | Path | None = None,
    stop_after: int | None = None,
    reporter: Reporter | None = None,
    device_flops_per_s: float | None = None,
    peak_memory: PeakMemory | None = None,
    job: Job | None = None,
) -> TrainResult:
    """Train ``model`` for ``section.num_steps`` updates in all.  A collective call.

    Args:
        model: see ``TrainableModel``.
        section: the job's ``train`` section.
        dataset: equal on all ranks.
        plan: the plan that cut the model; its prediction goes into the metrics.
        run_dir: gets ``run.json``, ``metrics.jsonl`` and ``checkpoints/``; on a disk that all ranks share.
        resume: ``"latest"`` of this run directory, a checkpoint or another run directory; None starts anew.
        stop_after: end, with a save, once this many updates are done; the learning rate still follows ``num_steps``.
        reporter: told of every step on rank 0.
        device_flops_per_s: one device's matrix-multiply rate, for ``mfu``; None leaves it out.
        peak_memory: made before the model, so that CUDA's peak counts its making; None counts from now.
        job: what ``section`` and ``dataset`` come from; checkpoints keep it, and a resumed run is held against it.

    SIGINT, SIGTERM and SIGHUP end the run after the current step, with a save.

    Raises:
        ConfigError, PlanError, DataError, CheckpointError: settings that contradict each other or the files.
        GalvatronError: the loss or the gradient norm is not finite, more often in a row than the section allows.
    """
    _check_agreement(model, section, dataset, plan)
    if section.router_bias_rate:
        model.move_router_biases(0.0)  # refused before the first step if there are none
    if section.capacity_factor != model.capacity_factor:
        raise ConfigError(
            f"the section says capacity_factor={section.capacity_factor} but the model was made with "
            f"{model.capacity_factor}; give parallelize the section's"
        )
    optimizer = build_optimizer(model.local_parameters, section)
    lineage = Lineage.of_run(section, model.config, dataset, job)
    state, notes = TrainState(step=0, world_size=world_size(), run=lineage), []
    if resume is None:
        on_rank_zero(lambda: _check_unused(run_dir))
    else:
        state = _resume(run_dir, resume, model, optimizer, lineage)
        notes = notable_changes(state.run, lineage, state.step)
        if state.world_size != world_size():
            notes.append(f"{state.world_size} processes saved it, {world_size()} go on: dropout draws other masks")
    last_step = section.num_steps if stop_after is None else min(stop_after, section.num_steps)
    if state.step >= last_step:
        raise ConfigError(f"{resume} has done {state.step} of {last_step} steps already; raise num_steps to train on")
    device = model.local_parameters[0].tensor.device if model.local_parameters else communication_device()
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        section=section,
        dataset=dataset,
        plan=plan,
        run_dir=run_dir,
        reporter=(reporter if rank() == 0 else None) or Reporter(),
        peak_memory=peak_memory or PeakMemory(device),
        device_flops_per_s=device_flops_per_s,
        lineage=lineage,
        step=state.step,
        skipped_steps=state.skipped_steps,
        skipped_in_a_row=state.skipped_in_a_row,
        last_step=last_step,
    )
    for note in notes:
        trainer.reporter.noted(note)
    return trainer.run()


def _check_agreement(model: TrainableModel, section: TrainSection, dataset: Dataset, plan: Plan) -> None:
    check_plan_for_job(plan, section)
    assert dataset.global_batch_size == section.global_batch_size
    if dataset.vocab_size > model.spec.vocab_size:
        raise DataError(
            f"the data has token ids up to {dataset.vocab_size - 1} but the model's vocab_size is "
            f"{model.spec.vocab_size}; use the model's own tokenizer or a larger vocab_size"
        )


def _check_unused(run_dir: Path) -> None:
    """A run that ended before its first save left nothing to go on from, so it may begin again."""
    if (run_dir / "checkpoints" / POINTER).exists():
        raise ConfigError(
            f"{run_dir} already holds a run; resume it, or give another run directory (or delete "
            f"{METRICS_FILE} and checkpoints/ there)"
        )


def _resume(
    run_dir: Path, resume: str | Path, model: TrainableModel, optimizer: torch.optim.Optimizer, lineage: Lineage
) -> TrainState:
    """Load the checkpoint that ``resume`` means, if ``lineage`` goes on from it."""
    directory = Path(on_rank_zero(lambda: str(find_checkpoint(run_dir / "checkpoints", resume))))
    before = on_rank_zero(lambda: read_state(directory)).run
    together(lambda: check_goes_on(before, lineage, directory))
    return load_checkpoint(directory, model, optimizer)
