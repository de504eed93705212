"""``galvatron train``: train a job under a plan, in a run directory.

Takes a job, a plan and where to start; gives metrics and checkpoints.  Knows nothing of how the plan was found.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from galvatron.core.errors import ConfigError, DataError, GalvatronError
from galvatron.core.hardware import HardwareProfile
from galvatron.core.job import Job
from galvatron.plan import Plan, check_plan_for_job

from .console import console, heading, rank, say
from .launch import Processes, processes
from .options import JobFile, Nproc, RunDir, examples
from .rundir import RunDirectory

if TYPE_CHECKING:
    from galvatron.core.model import ModelSpec
    from galvatron.parallelize.world import World
    from galvatron.train import TrainResult


@dataclass(frozen=True)
class Leg:
    """A stretch of training under one plan.

    ``resume`` is what ``galvatron.train.train`` takes: None, ``latest`` or a path; ``stop_after`` ends the leg
    before the job's ``num_steps``; ``name`` and ``first_step`` are for people.
    """

    job: Job
    plan: Plan
    run: RunDirectory
    resume: str | None = None
    stop_after: int | None = None
    name: str = "the plan"
    first_step: int = 1

    @property
    def end(self) -> int:
        """How many updates are done after this leg."""
        return self.stop_after or self.job.train.num_steps

    def from_step(self, done: int) -> Leg:
        """The leg with ``done`` updates behind it."""
        return replace(self, resume="latest" if done else None)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        epilog=examples(
            "galvatron train job.toml --plan plan.json --nproc 4",
            "galvatron train job.toml --plan other-plan.json --resume latest",
            "torchrun --nproc-per-node 8 --no-python galvatron train job.toml --plan plan.json",
        )
    )(train)


def train(
    job: JobFile,
    plan: Annotated[Path, typer.Option("--plan", help="The plan to train under.")],
    run_dir: RunDir = None,
    resume: Annotated[
        str | None, typer.Option("--resume", help="latest, a checkpoint, or another run directory.")
    ] = None,
    nproc: Nproc = None,
) -> None:
    """Train a job under a plan; any checkpoint resumes under any plan.

    Writes metrics.jsonl, plan.json and checkpoints/ into the run directory.
    """
    leg = Leg(Job.load(job), Plan.load(plan), RunDirectory.of_job(job, run_dir), resume)
    with processes(nproc, leg.job.cluster.device, leg.job.cluster.num_processes) as ranks:
        spec = check_job(ranks, leg.job, leg.run, resume)
        leg.plan.validate(spec, ranks.world_size)
        check_plan_for_job(leg.plan, leg.job.train)
        heading("Train")
        say(leg.plan.describe())
        run_leg(ranks, leg)
        if rank() == 0:
            show_summary(leg.run, [leg])


def check_job(ranks: Processes, job: Job, run: RunDirectory, resume: str | None) -> ModelSpec:
    """Find what is wrong with settings, model, data and the checkpoint to resume, before anything else is done."""
    from galvatron.models import build_spec, load_config, meta_model
    from galvatron.parallelize.weights import check_names
    from galvatron.train import Lineage, check_goes_on, find_checkpoint, load_dataset, read_state

    config = load_config(job.model.path)
    spec = build_spec(config)
    if resume is not None:
        checkpoint = find_checkpoint(run.checkpoints, resume)
        before = read_state(checkpoint).run
        check_goes_on(before, Lineage.of_job(job, config), checkpoint)
    if job.train.seq_len > spec.max_seq_len:
        raise ConfigError(
            f"train.seq_len={job.train.seq_len} must not exceed the model's {spec.max_seq_len} positions; lower it"
        )
    if job.model.weights and resume is None:
        given = ranks.here(lambda: _weights(job.model.path, config))
        with warnings.catch_warnings(action="ignore"):  # said once, where they are loaded
            check_names(given, meta_model(config), {})
    with _no_empty_directories(run.path, run.path / "data"):
        dataset = ranks.here(lambda: load_dataset(job.data, job.train, run.path))
        if dataset.vocab_size > spec.vocab_size:
            raise DataError(
                f"tokenizer {job.data.tokenizer} has {dataset.vocab_size} tokens but the model's vocabulary only "
                f"{spec.vocab_size}; use the model's own tokenizer or a larger vocab_size"
            )
        if resume is not None:
            check_goes_on(before, Lineage.of_run(job.train, config, dataset, job), checkpoint)
    return spec


@contextmanager
def _no_empty_directories(*paths: Path) -> Iterator[None]:
    """After an error, take back directories that hold nothing."""
    try:
        yield
    except GalvatronError:
        for path in reversed(paths):
            with suppress(OSError):
                path.rmdir()
        raise


def run_leg(ranks: Processes, leg: Leg) -> None:
    """Train one leg on all ranks; the run directory's plan.json is the first leg's."""
    if leg.first_step == 1:
        ranks.on_main(lambda: leg.plan.save(leg.run.plan))
    result = ranks.run(_train, leg)
    if result.stopped_by is not None:
        say(f"stopped after step {result.steps}; {result.checkpoint} is complete")
        raise KeyboardInterrupt


def _train(world: World, leg: Leg) -> TrainResult:
    """One rank's part."""
    from galvatron import train
    from galvatron.models import load_config, meta_model
    from galvatron.parallelize import parallelize

    from .progress import ConsoleReporter

    section = leg.job.train
    peak_memory = train.PeakMemory(world.device)
    dataset = train.load_dataset(leg.job.data, section, leg.run.path)
    config = load_config(leg.job.model.path)
    weights = _weights(leg.job.model.path, config) if leg.job.model.weights and leg.resume is None else None
    model = parallelize(meta_model(config), leg.plan, world=world, weights=weights, seed=section.seed)
    reporter = ConsoleReporter()
    try:
        return train.train(
            model,
            section,
            dataset,
            plan=leg.plan,
            run_dir=leg.run.path,
            resume=leg.resume,
            stop_after=leg.stop_after,
            reporter=reporter,
            device_flops_per_s=_device_flops_per_s(leg),
            peak_memory=peak_memory,
            job=leg.job,
        )
    finally:
        reporter.close()


def _weights(path: str, config: Any) -> Any:
    """The safetensors beside a config file, in a directory, or of a hub name (fetched once by rank 0)."""
    from galvatron.models import family_of
    from galvatron.parallelize import SafetensorsWeights
    from galvatron.parallelize.ranks import on_rank_zero, together

    directory = Path(path).parent if Path(path).is_file() else Path(path)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.safetensors.index.json", "config.json"]
        directory = Path(on_rank_zero(lambda: snapshot_download(path, allow_patterns=patterns)))
    return together(lambda: SafetensorsWeights(directory, base_prefix=family_of(config).decoder))


def _device_flops_per_s(leg: Leg) -> float | None:
    if not leg.run.hardware.exists():
        return None
    rates = HardwareProfile.load(leg.run.hardware).device.matmul_flops_per_s
    return rates.get(leg.job.train.precision)


def show_summary(run: RunDirectory, legs: Sequence[Leg]) -> None:
    """The table of predicted and measured, a row a leg."""
    from galvatron.train import StepMetrics, read_metrics

    from .progress import summary

    steps = [StepMetrics.model_validate(row) for row in read_metrics(run.metrics) if "loss" in row]
    rows = [(leg.name, [step for step in steps if leg.first_step <= step.step <= leg.end]) for leg in legs]
    console().print(summary(rows))
