"""The training loop: batch → gradients → clip → learning rate → update → metrics, with evaluation and saves.

Takes a model that a plan has cut, a TrainSection and a Dataset; gives a run directory.  Prints nothing:
whoever wants to see progress passes a Reporter.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from galvatron.core.errors import ConfigError, DataError, GalvatronError
from galvatron.core.job import Job, TrainSection
from galvatron.parallelize.ranks import all_max, communication_device, on_rank_zero, rank, together, world_size
from galvatron.plan import Plan, check_plan_for_job

from .checkpoint import (
    POINTER,
    TrainState,
    find_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
    seed_rank,
)
from .data import IGNORED_LABEL, Dataset
from .interface import Reporter, TrainableModel
from .lineage import RUN_FILE, Lineage, check_goes_on, notable_changes
from .memory import PeakMemory
from .metrics import METRICS_FILE, MetricsLog, StepMetrics
from .optimizer import build_optimizer, lr_at, set_lr

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended: ``steps`` updates are done and saved in ``checkpoint``.

    ``final_loss`` is the last update's training loss, ``eval_loss`` the last evaluation's (None without one);
    ``stopped_by`` is the signal that ended the run early, if one did.
    """

    steps: int
    final_loss: float
    eval_loss: float | None
    checkpoint: Path
    stopped_by: signal.Signals | None


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

    Every rank's random generators (dropout) start from (seed, 0, rank), or where the checkpoint left them.
    SIGINT, SIGTERM and SIGHUP end the run after the current step, with a save.

    Raises:
        ConfigError, PlanError, DataError, CheckpointError: settings that contradict each other or the files.
        GalvatronError: the loss or the gradient norm is not finite.
    """
    _check_agreement(model, section, dataset, plan)
    optimizer = build_optimizer(model.local_parameters, section)
    lineage = Lineage.of_run(section, model.config, dataset, job)
    done, notes = 0, []
    if resume is None:
        on_rank_zero(lambda: _check_unused(run_dir))
        seed_rank(section.seed, 0)
    else:
        state, interruption = _resume(run_dir, resume, model, optimizer, lineage)
        done, notes = state.step, notable_changes(state.run, lineage, state.step)
        notes += [] if interruption is None else [interruption]
    last_step = section.num_steps if stop_after is None else min(stop_after, section.num_steps)
    if done >= last_step:
        raise ConfigError(f"{resume} has done {done} of {last_step} steps already; raise num_steps to train on")
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
        step=done,
        last_step=last_step,
    )
    for note in notes:
        trainer.reporter.noted(note)
    return trainer.run()


@dataclass(kw_only=True)
class Trainer:
    """A run between two steps: ``step`` updates are done, ``last_step`` is where it ends; see ``train``."""

    model: TrainableModel
    optimizer: torch.optim.Optimizer
    section: TrainSection
    dataset: Dataset
    plan: Plan
    run_dir: Path
    reporter: Reporter
    peak_memory: PeakMemory
    device_flops_per_s: float | None
    lineage: Lineage
    step: int
    last_step: int
    loss: float = math.nan
    eval_loss: float | None = None
    checkpoint: Path | None = None

    def run(self) -> TrainResult:
        """Step until ``last_step`` or a signal; evaluate and save as the section says, and at the end."""
        log = None
        if rank() == 0:
            self.lineage.save(self.run_dir / RUN_FILE)
            log = MetricsLog(self.run_dir, self.step, tensorboard=self.section.tensorboard)
        self.reporter.started(self.step + 1, self.last_step)
        try:
            with _stop_requests() as request:
                stopped = 0
                while self.step < self.last_step and not stopped:
                    metrics, stopped = self._train_step(request)
                    if log is not None:
                        log.step(metrics)
                    self.reporter.stepped(metrics)
                    is_last = self.step == self.last_step
                    if not stopped and (is_last or _is_due(self.step, self.section.eval_every)):
                        self._evaluate(log)
                    if is_last or stopped or _is_due(self.step, self.section.save_every):
                        self._save()
        finally:
            if log is not None:
                log.close()
        assert self.checkpoint is not None
        return TrainResult(
            steps=self.step,
            final_loss=self.loss,
            eval_loss=self.eval_loss,
            checkpoint=self.checkpoint,
            stopped_by=signal.Signals(stopped) if self.step < self.last_step else None,
        )

    def _train_step(self, request: _StopRequest) -> tuple[StepMetrics, int]:
        """One update; its metrics, and the signal by which any rank was asked to stop, else 0."""
        start = time.perf_counter()
        inputs, labels = self.dataset.batch(self.step)
        lr = lr_at(self.step, self.section)
        set_lr(self.optimizer, lr)
        with self.peak_memory.watch(self.model, self.optimizer):
            self.model.steps = self.step
            self.loss = self.model.train_step(inputs, labels)
            grad_norm = self.model.clip_grad_norm_(self.section.max_grad_norm)
            self._check_finite(grad_norm)
            self.optimizer.step()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the update runs on after its launch, and belongs to this step
        seconds = time.perf_counter() - start
        self.step += 1
        peak_bytes, stop = all_max([float(self.peak_memory.bytes()), float(request.signum)])
        return self._metrics(grad_norm, lr, seconds, int(peak_bytes)), int(stop)

    def _check_finite(self, grad_norm: float) -> None:
        for name, value in (("loss", self.loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                raise GalvatronError(
                    f"the {name} is {value} at step {self.step + 1}, training cannot go on; "
                    f"resume from the latest checkpoint with a lower lr than {self.section.lr} or a longer warm-up"
                )

    def _metrics(self, grad_norm: float, lr: float, seconds: float, peak_bytes: int) -> StepMetrics:
        tokens_per_s = self.section.global_batch_size * self.section.seq_len / seconds
        flops_per_s = tokens_per_s * self.model.spec.flops_per_token(self.section.seq_len)
        peak_flops_per_s = None if self.device_flops_per_s is None else self.device_flops_per_s * world_size()
        prediction = self.plan.prediction
        return StepMetrics(
            step=self.step,
            loss=self.loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens_per_s=tokens_per_s,
            step_time_s=seconds,
            predicted_step_time_s=None if prediction is None else prediction.step_time_s,
            peak_memory_bytes=peak_bytes,
            predicted_peak_memory_bytes=None if prediction is None else prediction.peak_memory_bytes,
            mfu=None if peak_flops_per_s is None else flops_per_s / peak_flops_per_s,
            model_flops_per_s=flops_per_s,
        )

    def _evaluate(self, log: MetricsLog | None) -> None:
        """Mean loss over the counted tokens of the first ``eval_batches`` evaluation batches."""
        total, count = 0.0, 0
        for index in range(min(self.section.eval_batches, self.dataset.num_eval_batches)):
            inputs, labels = self.dataset.eval_batch(index)
            counted = int((labels != IGNORED_LABEL).sum())
            total += self.model.evaluate(inputs, labels) * counted
            count += counted
        if count == 0:
            return
        self.eval_loss = total / count
        if log is not None:
            log.evaluation(self.step, self.eval_loss)
        self.reporter.evaluated(self.step, self.eval_loss)

    def _save(self) -> None:
        state = TrainState(step=self.step, world_size=world_size(), run=self.lineage)
        root = self.run_dir / "checkpoints"
        keep = self.section.keep_checkpoints
        self.checkpoint = save_checkpoint(root, self.model, self.optimizer, state, plan=self.plan, keep=keep)
        self.reporter.saved(self.step, self.checkpoint)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_agreement(model: TrainableModel, section: TrainSection, dataset: Dataset, plan: Plan) -> None:
    check_plan_for_job(plan, section)
    for name in ("global_batch_size", "seq_len"):
        assert getattr(dataset, name) == getattr(section, name)
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
) -> tuple[TrainState, str | None]:
    """Load the checkpoint that ``resume`` means, if ``lineage`` goes on from it."""
    directory = Path(on_rank_zero(lambda: str(find_checkpoint(run_dir / "checkpoints", resume))))
    before = on_rank_zero(lambda: read_state(directory)).run
    together(lambda: check_goes_on(before, lineage, directory))
    return load_checkpoint(directory, model, optimizer)


@dataclass
class _StopRequest:
    """The last signal that asked this process to stop; 0 until then."""

    signum: int = 0

    def set(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum


@contextmanager
def _stop_requests() -> Iterator[_StopRequest]:
    """What SIGINT, SIGTERM and SIGHUP ask for, in place of what they did; an ignored signal (nohup) stays ignored."""
    request = _StopRequest()
    previous = {}
    if threading.current_thread() is threading.main_thread():
        asking = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, request.set) for number in asking}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
