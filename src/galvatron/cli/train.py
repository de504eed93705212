"""``galvatron train``: train a job under a plan, in a run directory.

Takes a job, a plan and where to start; gives metrics and checkpoints.  Knows nothing of how the plan was found.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from galvatron.core.errors import ConfigError, DataError
from galvatron.core.hardware import HardwareProfile
from galvatron.core.job import Job
from galvatron.core.tasks import TOKEN_TASKS
from galvatron.core.units import format_seconds
from galvatron.plan import Plan, check_plan_for_job

from .console import console, heading, rank, say
from .data import config_of_job, prepare_data, read_data
from .launch import Processes, processes
from .legs import Leg, starting_point
from .options import JobFile, LoraSettings, Nproc, RunDir, TaskName, Validation, examples
from .rundir import RunDirectory
from .weights import directory_of, first_weights

if TYPE_CHECKING:
    from galvatron.core.model import ModelSpec
    from galvatron.parallelize import ParallelModel
    from galvatron.parallelize.processes.world import World
    from galvatron.train import TrainResult


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
        str | None,
        typer.Option("--resume", help="latest (also under another plan), a checkpoint, or another run directory."),
    ] = None,
    nproc: Nproc = None,
    validation: Validation = None,
    lora: LoraSettings = None,
    task: TaskName = None,
) -> None:
    """Train a job under a plan; any checkpoint resumes under any plan.

    Writes metrics.jsonl, plan.json and checkpoints/ into the run directory.  The same command goes on where it was
    cut off.
    """
    loaded = Job.load(job).validated_on(validation).adapted(lora).trained_for(task)
    leg = Leg(loaded, Plan.load(plan), RunDirectory.of_job(job, run_dir), resume)
    with processes(nproc, leg.job.cluster.device, leg.job.cluster.num_processes) as ranks:
        config, spec = check_model(leg.job)
        leg.plan.validate(spec, ranks.world_size)
        check_plan_for_job(leg.plan, leg.job.train)
        with ranks.locked(leg.run.path):
            start = ranks.on_main(lambda: starting_point(leg, config))
            if start.done >= leg.end and leg.run.latest is not None:
                say(f"{leg.run.path} has done {start.done} steps already")
            else:
                check_inputs(ranks, leg.job, leg.run, config, spec, start.checkpoint)
                heading("Train")
                say(leg.plan.describe())
                run_leg(ranks, replace(leg, resume=start.checkpoint))
            if rank() == 0:
                show_summary(leg.run, [leg])


def check_model(job: Job) -> tuple[Any, ModelSpec]:
    """The model's configuration and its spec, with what is wrong with them; touches no file of the run."""
    from galvatron.models import build_spec

    config = config_of_job(job)
    spec = build_spec(config, freeze=job.model.freeze, lora=job.model.lora)
    if spec.task == "image_classification" and job.train.seq_len != spec.max_seq_len:
        raise ConfigError(
            f"train.seq_len={job.train.seq_len} must be the {spec.max_seq_len} tokens that the model makes of an image"
            "; set it"
        )
    if job.train.seq_len > spec.max_seq_len:
        raise ConfigError(
            f"train.seq_len={job.train.seq_len} must not exceed the model's {spec.max_seq_len} positions; lower it"
        )
    return config, spec


def check_inputs(
    ranks: Processes, job: Job, run: RunDirectory, config: Any, spec: ModelSpec, checkpoint: str | None
) -> None:
    """Make the tokens, and find what is wrong with them, and with weights to start from or a checkpoint to resume."""
    from galvatron.models import meta_model
    from galvatron.parallelize.state.weights import check_names
    from galvatron.train import Lineage, check_goes_on, read_state

    if job.model.weights and checkpoint is None:
        given = ranks.here(lambda: first_weights(job, config))
        if given.new:
            say(f"new, and initialised from train.seed: {', '.join(sorted(given.new))} ({given.origin} has none such)")
        with warnings.catch_warnings(record=True, action="always") as left_out:
            check_names(given, meta_model(config), {})
        for warning in left_out:
            say(f"warning: {warning.message}")
    ranks.on_main(lambda: prepare_data(job, run, spec.task))
    dataset = ranks.here(lambda: read_data(job, run, config))
    vocab_size = max(given.vocab_size for given in (dataset, dataset.validation) if given is not None)
    if vocab_size > spec.vocab_size:
        raise DataError(
            f"tokenizer {job.data.tokenizer} has {vocab_size} tokens but the model's vocabulary only "
            f"{spec.vocab_size}; use the model's own tokenizer or a larger vocab_size"
            if spec.task in TOKEN_TASKS
            else f"{job.data.source} has {vocab_size} classes, the model only {spec.vocab_size}; set model.num_labels"
        )
    if checkpoint is not None:
        now = Lineage.of_run(job.train, config, dataset, job)
        check_goes_on(read_state(Path(checkpoint)).run, now, Path(checkpoint))


def run_leg(ranks: Processes, leg: Leg) -> None:
    """Train one leg on all ranks.

    Raises:
        SystemExit: 128 + the signal that stopped it.
    """
    try:
        result = ranks.run(_train, leg)
        if result.stopped_by is not None:
            raise SystemExit(128 + result.stopped_by)
    except SystemExit:
        with suppress(OSError):  # a terminal that is gone
            say(_what_is_kept(leg.run))
        raise


def _what_is_kept(run: RunDirectory) -> str:
    if run.latest is None:
        return "stopped before the first save; the same command begins anew"
    return f"stopped; {run.latest} is complete, and the same command goes on from there"


def _train(world: World, leg: Leg) -> TrainResult:
    """One rank's part."""
    from galvatron import train
    from galvatron.models import name_classes

    from .progress import ConsoleReporter

    section = leg.job.train
    peak_memory = train.PeakMemory(world.device)
    config = config_of_job(leg.job)
    dataset = train.load_dataset(leg.job.data, section, leg.run.path, config=config)
    if dataset.class_names:
        name_classes(config, dataset.class_names)
    model = _parallel(world, leg, config)
    unlike = leg.plan.prediction and leg.plan.prediction.unlike(compiled=model.compiled)
    if unlike:
        say(unlike)
    task = model.spec.task
    masked = task == "text_classification" or (task == "seq2seq_lm" and leg.job.data.records == "pairs")
    packed = masked or (task == "causal_lm" and leg.job.data.is_apart)
    if model.compiled:
        say(f"layers compiled in {format_seconds(model.warm_up(packed=packed))}")
    reporter = ConsoleReporter(on_start=lambda: _keep_plan(leg))
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


def _parallel(world: World, leg: Leg, config: Any) -> ParallelModel:
    """The job's model under the leg's plan, with its first weights unless a checkpoint brings others."""
    from galvatron.models import model_to_train
    from galvatron.parallelize import parallelize

    section, described = leg.job.train, leg.job.model
    weights = first_weights(leg.job, config) if described.weights and leg.resume is None else None
    whole = model_to_train(config, described.freeze, described.lora, directory_of(described.path))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the model lacks and that are left out")  # said by check_inputs
        return parallelize(
            whole,
            leg.plan,
            world=world,
            weights=weights,
            seed=section.seed,
            compile=section.compiled,
            fp8=section.fp8,
            capacity_factor=section.capacity_factor,
        )


def _keep_plan(leg: Leg) -> None:
    """The run directory's plan.json is the first leg's, written when nothing is left to refuse."""
    if leg.first_step == 1:
        leg.plan.save(leg.run.plan)


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
