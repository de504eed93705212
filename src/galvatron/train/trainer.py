"""The training loop: batch → gradients → clip → learning rate → update → metrics, with evaluation and saves.

Takes what ``start`` has checked.  Losses and norms are equal on all ranks, so all skip, evaluate and save alike.
"""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from galvatron.core.errors import GalvatronError
from galvatron.core.job import TrainSection
from galvatron.core.tasks import TOKEN_TASKS
from galvatron.parallelize.losses.scale import LossScale
from galvatron.parallelize.processes.ranks import all_max, rank, world_size
from galvatron.plan import Plan

from .checkpoint import TrainState, save_checkpoint
from .data import IGNORED_LABEL, Batch, Dataset
from .interface import Reporter, TrainableModel
from .lineage import RUN_FILE, Lineage
from .memory import PeakMemory
from .metrics import Metric, MetricsLog, StepMetrics, perplexity
from .optimizer import lr_at, set_lr, update
from .stop import StopRequest, stop_requests


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended: ``steps`` batches are behind it, which ``checkpoint`` holds.

    ``final_loss`` is the training loss of the last one learnt from, ``eval_loss`` the last evaluation's of what was
    held out and ``validation_loss`` of the validation source (None without one); ``stopped_by`` is the signal that
    ended the run early, if one did.
    """

    steps: int
    final_loss: float
    eval_loss: float | None
    validation_loss: float | None
    checkpoint: Path
    stopped_by: signal.Signals | None


@dataclass(kw_only=True)
class Trainer:
    """A run between two steps: ``step`` are done, ``skipped_steps`` of them without learning; ``last_step`` ends it."""

    model: TrainableModel
    optimizer: torch.optim.AdamW
    section: TrainSection
    dataset: Dataset
    plan: Plan
    run_dir: Path
    reporter: Reporter
    peak_memory: PeakMemory
    device_flops_per_s: float | None
    lineage: Lineage
    step: int
    skipped_steps: int
    skipped_in_a_row: int
    last_step: int
    loss: float = math.nan
    upcoming: Batch | None = None
    eval_loss: float | None = None
    validation_loss: float | None = None
    checkpoint: Path | None = None

    def run(self) -> TrainResult:
        """Step until ``last_step`` or a signal; evaluate and save as the section says, and at the end."""
        log = None
        if rank() == 0:
            self.lineage.save(self.run_dir / RUN_FILE)
            log = MetricsLog(self.run_dir, self.step, tensorboard=self.section.tensorboard)
        self.reporter.started(self.step + 1, self.last_step)
        try:
            with stop_requests() as request:
                stopped = 0
                while self.step < self.last_step and not stopped:
                    stopped = self._train_step(log, request)
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
            validation_loss=self.validation_loss,
            checkpoint=self.checkpoint,
            stopped_by=signal.Signals(stopped) if self.step < self.last_step else None,
        )

    def _train_step(self, log: MetricsLog | None, request: StopRequest) -> int:
        """Learn from one batch, or skip it; the signal by which any rank was asked to stop, else 0."""
        start = time.perf_counter()
        batch = self.upcoming or self.dataset.batch(self.step)
        terms = {"label_smoothing": self.section.label_smoothing, "z_loss": self.section.z_loss}
        lr = lr_at(self.step, self.section)
        set_lr(self.optimizer, lr)
        with self.peak_memory.watch(self.model, self.optimizer, tuple(batch.values())):
            self.model.steps, scale = self.step, self.model.loss_scale
            loss = self.model.train_step(**batch, **terms)
            norm = self.model.grad_norm()
            update(self.optimizer, loss, norm, self.section.max_grad_norm, 1.0 if scale is None else scale.scale)
        more = self.step + 1 < self.last_step
        self.upcoming = self.dataset.batch(self.step + 1) if more else None  # while the device works
        # the only time that the host waits for the device
        known = [float(self.peak_memory.bytes()), float(request.signum)]
        dropped = [self.model.dropped_choices().double()] if self.section.capacity_factor else []
        peak_bytes, stop, loss_now, grad_norm, *counts = all_max(known, beside=[loss.double(), norm.double(), *dropped])
        seconds = time.perf_counter() - start
        if scale is not None:
            self.model.zero_grad()  # they carry the scale
            self.model.loss_scale = scale.after(finite=math.isfinite(grad_norm))
        overflow = _overflow(loss_now, grad_norm, scale)
        defect = overflow or _defect(loss_now, grad_norm)
        if overflow is not None:
            self.skipped_steps += 1
        elif defect is not None:
            self._count_skipped(defect)
        self.step += 1
        if defect is None:
            if self.section.router_bias_rate:
                self.model.move_router_biases(self.section.router_bias_rate)
            self.loss, self.skipped_in_a_row = loss_now, 0
            metrics = self._metrics(grad_norm, lr, scale, seconds, int(peak_bytes), *map(int, counts))
            if log is not None:
                log.step(metrics)
            self.reporter.stepped(metrics)
        else:
            if log is not None:
                log.skipped(self.step, defect)
            self.reporter.skipped(self.step, defect)
        return int(stop)

    def _count_skipped(self, defect: str) -> None:
        """One more batch is behind the run that taught nothing; raises GalvatronError if they are too many."""
        before, allowed = self.skipped_in_a_row, self.section.max_skipped_steps
        if before >= allowed:
            after = f" after {before} skipped in a row" if before else ""
            raise GalvatronError(
                f"{defect} at step {self.step + 1}{after}, training cannot go on; resume from the latest checkpoint "
                f"with a lower lr than {self.section.lr}, a longer warm-up, or max_skipped_steps above {allowed}"
            )
        self.skipped_in_a_row += 1
        self.skipped_steps += 1

    def _metrics(
        self,
        grad_norm: float,
        lr: float,
        scale: LossScale | None,
        seconds: float,
        peak_bytes: int,
        dropped_choices: int | None = None,
    ) -> StepMetrics:
        samples_per_s = self.section.global_batch_size / seconds
        tokens_per_s = samples_per_s * self.section.seq_len
        flops_per_s = tokens_per_s * self.model.spec.flops_per_token(self.section.seq_len)
        peak_flops_per_s = None if self.device_flops_per_s is None else self.device_flops_per_s * world_size()
        prediction = self.plan.prediction
        return StepMetrics(
            step=self.step,
            loss=self.loss,
            grad_norm=grad_norm,
            lr=lr,
            loss_scale=None if scale is None else scale.scale,
            dropped_choices=dropped_choices,
            samples_per_s=samples_per_s,
            tokens_per_s=tokens_per_s,
            step_time_s=seconds,
            predicted_step_time_s=None if prediction is None else prediction.step_time_s,
            peak_memory_bytes=peak_bytes,
            predicted_peak_memory_bytes=None if prediction is None else prediction.peak_memory_bytes,
            mfu=None if peak_flops_per_s is None else flops_per_s / peak_flops_per_s,
            model_flops_per_s=flops_per_s,
        )

    def _evaluate(self, log: MetricsLog | None) -> None:
        """The loss of what is held out, and that of the validation source, each as far as there is one."""
        for name, dataset in {"eval_loss": self.dataset, "validation_loss": self.dataset.validation}.items():
            found = None if dataset is None else self._mean_loss(dataset)
            if found is not None:
                loss, metric = found
                setattr(self, name, loss)
                if log is not None:
                    log.evaluation(self.step, loss, name, metric)
                self.reporter.evaluated(self.step, loss, name, metric)

    def _mean_loss(self, dataset: Dataset) -> tuple[float, Metric] | None:
        """Mean loss over what counts in the first ``eval_batches`` evaluation batches, and its metric; None without."""
        of_tokens = self.model.spec.task in TOKEN_TASKS
        total, right, count = 0.0, 0.0, 0
        for index in range(min(self.section.eval_batches, dataset.num_eval_batches)):
            batch = dataset.eval_batch(index)
            labels = batch.get("labels")
            counted = dataset.global_batch_size if labels is None else int((labels != IGNORED_LABEL).sum())
            if of_tokens:
                loss = self.model.evaluate(**batch)
            else:
                loss, share = self.model.evaluate_classes(**batch)
                right += float(share) * counted
            total += float(loss) * counted
            count += counted
        if not count:
            return None
        return total / count, perplexity(total / count) if of_tokens else Metric("accuracy", right / count)

    def _save(self) -> None:
        state = TrainState(
            step=self.step,
            world_size=world_size(),
            run=self.lineage,
            skipped_steps=self.skipped_steps,
            skipped_in_a_row=self.skipped_in_a_row,
            loss_scale=self.model.loss_scale,
        )
        root = self.run_dir / "checkpoints"
        keep = self.section.keep_checkpoints
        self.checkpoint = save_checkpoint(root, self.model, self.optimizer, state, plan=self.plan, keep=keep)
        self.reporter.saved(self.step, self.checkpoint)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _defect(loss: float, grad_norm: float) -> str | None:
    """What makes a step useless, in words; its gradients would spoil the weights."""
    values = {"loss": loss, "gradient norm": grad_norm}
    return next((f"the {name} is {value}" for name, value in values.items() if not math.isfinite(value)), None)


def _overflow(loss: float, grad_norm: float, scale: LossScale | None) -> str | None:
    """That the loss scale was too large, in words: it is less from now on, and the run learns from the next step."""
    if scale is None or scale.is_least or not math.isfinite(loss) or math.isfinite(grad_norm):
        return None
    return f"the gradients overflow fp16 at a loss scale of {scale.scale:.0f}"
