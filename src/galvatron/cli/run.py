"""``galvatron run``: all of it from one job file: profile, search, train, restart, generate.

Takes a job file; fills a run directory.  What the directory already holds and what still fits the job is kept,
so a run that was cut off goes on with the same command.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from galvatron.core.errors import PlanError
from galvatron.core.hardware import HardwareProfile
from galvatron.core.job import Job
from galvatron.core.model_profile import ModelProfile
from galvatron.core.units import format_bytes
from galvatron.plan import Plan, check_plan_for_job

from .console import heading, rank, say
from .drawing import draw
from .generate import check_generates, generate
from .launch import Processes, processes
from .legs import Leg, Start, start_at
from .options import JobFile, LoraSettings, Nproc, RunDir, TaskName, Validation, examples
from .profile import Measurement, ModelRequest, measure
from .rundir import RunDirectory
from .search import search_for_job, show
from .train import check_inputs, check_model, run_leg, show_summary

if TYPE_CHECKING:
    from galvatron.core.model import ModelSpec
    from galvatron.search import SearchResult


RUNNER_UP = "runner-up"  # what resume.plan may say in place of a file


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        epilog=examples(
            "galvatron run examples/quickstart.toml",
            "galvatron run job.toml --lora r=16,lora_alpha=32,target_modules=q_proj+v_proj",
            "torchrun --nproc-per-node 8 --no-python galvatron run job.toml --run-dir runs/first",
        )
    )(run)


def run(
    job: JobFile,
    run_dir: RunDir = None,
    nproc: Nproc = None,
    validation: Validation = None,
    lora: LoraSettings = None,
    task: TaskName = None,
) -> None:
    """Profile, search, train, and what else the job file asks for.

    Continues where an earlier run of the same directory ended.
    """
    loaded = Job.load(job).validated_on(validation).adapted(lora).trained_for(task)
    directory = RunDirectory.of_job(job, run_dir)
    with processes(nproc, loaded.cluster.device, loaded.cluster.num_processes) as ranks:
        config, spec = check_model(loaded)
        check_generates(loaded, spec.task)
        if loaded.resume is not None and loaded.resume.plan != RUNNER_UP:
            other = Plan.load(loaded.resume.plan)
            other.validate(spec, ranks.world_size)
            check_plan_for_job(other, loaded.train)
        with ranks.locked(directory.path):
            start = ranks.on_main(lambda: _start(loaded, config, directory))
            if start.done < loaded.train.num_steps:
                check_inputs(ranks, loaded, directory, config, spec, start.checkpoint)
                profile_missing(ranks, loaded, directory, spec)
                legs = ranks.on_main(lambda: plan_legs(loaded, directory))
                for leg in legs:
                    _train_what_is_left(ranks, leg, ranks.on_main(lambda: _start(loaded, config, directory)))
            else:
                say(f"{directory.path} has done {start.done} steps already")
                legs = legs_under(Plan.load(Path(str(start.checkpoint)) / "plan.json"), None, loaded, directory)
            if loaded.generate is not None:
                ranks.on_main(lambda: generate(loaded, directory))
            if rank() == 0:
                show_summary(directory, legs)


def _start(job: Job, config: Any, run: RunDirectory) -> Start:
    """The run's latest checkpoint, if this job is the run it is of."""
    latest = run.latest
    return Start() if latest is None else start_at(latest, job, config)


def profile_missing(ranks: Processes, job: Job, run: RunDirectory, spec: ModelSpec) -> None:
    """Measure what the run directory lacks or holds for another world, model, length, precision or compiler."""
    heading("Profile")
    kept_hardware = run.hardware.exists() and _hardware_fits(run, ranks.world_size, job.cluster.device)
    kept_model = kept_hardware and run.model.exists() and _model_fits(run, job, spec)
    section = job.train
    request = ModelRequest(
        job.model.path,
        section.seq_len,
        section.precision,
        job.model.freeze,
        section.compiled,
        section.fp8,
        job.model.lora,
        job.model.task,
        job.model.num_labels,
    )
    measurement = Measurement(
        hardware_out=None if kept_hardware else run.hardware, model_out=None if kept_model else run.model, model=request
    )
    for path, kept in ((run.hardware, kept_hardware), (run.model, kept_model)):
        if kept:
            say(f"{path} is kept")
    if not (kept_hardware and kept_model):
        measure(ranks, measurement)


def _hardware_fits(run: RunDirectory, world_size: int, device: str) -> bool:
    profile = HardwareProfile.load(run.hardware)
    return profile.world_size == world_size and device in ("auto", profile.device.type)


def _model_fits(run: RunDirectory, job: Job, spec: ModelSpec) -> bool:
    profile, compiled = ModelProfile.load(run.model), job.train.compiled
    if compiled is None:
        compiled = HardwareProfile.load(run.hardware).device.type == "cuda"
    found = (profile.spec, profile.seq_len, profile.precision, profile.compiled, profile.fp8)
    return found == (spec, job.train.seq_len, job.train.precision, compiled, job.train.fp8)


def plan_legs(job: Job, run: RunDirectory) -> list[Leg]:
    """Search, save and show the plan; the stretches of training that the job asks for."""
    heading("Search")
    model, hardware = ModelProfile.load(run.model), HardwareProfile.load(run.hardware)
    model = model.with_capacity(job.train.capacity_factor)
    result = search_for_job(job, model, hardware)
    other = None if job.resume is None else _second_plan(job.resume.plan, result, model, hardware)
    result.plan.save(run.plan)
    if other is not None:
        other.save(run.resumed_plan)
    show(result)
    draw(result.plan, model, hardware, run.timeline)
    return legs_under(result.plan, other, job, run)


def legs_under(plan: Plan, other: Plan | None, job: Job, run: RunDirectory) -> list[Leg]:
    """The stretches of training that ``job`` asks for, the second under ``other``."""
    if job.resume is None:
        return [Leg(job, plan, run)]
    at_step = job.resume.at_step
    return [
        Leg(job, plan, run, stop_after=at_step),
        Leg(job, other or plan, run, name="another plan", first_step=at_step + 1),
    ]


def _second_plan(name: str, result: SearchResult, model: ModelProfile, hardware: HardwareProfile) -> Plan:
    from galvatron.search.second import second_plan

    if name != RUNNER_UP:
        return Plan.load(name)
    other = second_plan(result, model, hardware)
    if other is None:
        raise PlanError(
            f"resume.plan is runner-up but no other plan fits in {format_bytes(result.memory_limit_bytes)}; raise "
            "search.memory, name a plan file or remove [resume]"
        )
    return other


def _train_what_is_left(ranks: Processes, leg: Leg, start: Start) -> None:
    """Train ``leg`` from ``start`` on, if that is not past it already."""
    heading("Train" if leg.first_step == 1 else "Resume under another plan")
    if start.done >= leg.end:
        say(f"{leg.run.path} has done {start.done} steps already")
        return
    say(leg.plan.describe())
    run_leg(ranks, replace(leg, resume=start.checkpoint))
