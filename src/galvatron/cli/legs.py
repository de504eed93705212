"""A stretch of training under one plan, and where it begins: anew, or at a checkpoint of this run or of another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galvatron.core.errors import ConfigError
from galvatron.core.job import Job
from galvatron.plan import Plan

from .rundir import RunDirectory


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


@dataclass(frozen=True)
class Start:
    """How many updates are done, and the checkpoint that holds them; None at the beginning."""

    done: int = 0
    checkpoint: str | None = None


def starting_point(leg: Leg, config: Any) -> Start:
    """Where to begin: the run's own latest checkpoint wherever that is further on than what ``leg`` asks for.

    So one command begins a run, goes on with it after a kill at any moment, and has nothing left to do at its end.

    Raises:
        ConfigError: the directory holds a run that this command did not begin.
        CheckpointError: there is no such checkpoint, or it is of another run.
    """
    from galvatron.train import find_checkpoint

    own, asked = leg.run.latest, leg.resume
    if asked is None or (asked == "latest" and own is None and leg.run.has_begun):
        return Start() if own is None else _own_run(leg, config, own)
    first = start_at(find_checkpoint(leg.run.checkpoints, asked), leg.job, config)
    if own is None or Path(str(first.checkpoint)).resolve().parent == own.resolve().parent:
        return first
    further = start_at(own, leg.job, config)
    if further.done < first.done:
        raise ConfigError(
            f"{leg.run.path} already holds a run, at step {further.done}, and {first.checkpoint} is at step "
            f"{first.done}; give another --run-dir"
        )
    return further


def _own_run(leg: Leg, config: Any, checkpoint: Path) -> Start:
    """The run that the directory holds, if its plan is this one."""
    start = start_at(checkpoint, leg.job, config)
    if Plan.load(checkpoint / "plan.json") != leg.plan:
        raise ConfigError(
            f"{leg.run.path} already holds a run under another plan, at step {start.done}; --resume latest goes on "
            "with it, or give another --run-dir"
        )
    return start


def start_at(checkpoint: Path, job: Job, config: Any) -> Start:
    """``checkpoint``, if ``job`` is the run it is of, as far as that is known without tokens; else CheckpointError."""
    from galvatron.train import Lineage, check_goes_on, read_state

    state = read_state(checkpoint)
    check_goes_on(state.run, Lineage.of_job(job, config), checkpoint)
    return Start(state.step, str(checkpoint))
