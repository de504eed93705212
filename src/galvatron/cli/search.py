"""``galvatron search``: the fastest plan that fits; needs no torch and no devices.

Takes a model, a cluster and limits; gives ``plan.json`` and its explanation.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from galvatron.core.errors import InfeasibleError
from galvatron.core.hardware import HardwareProfile
from galvatron.core.job import Job, SearchSection
from galvatron.core.lora import Lora
from galvatron.core.model import ReduceDtype
from galvatron.core.model_profile import ModelProfile
from galvatron.core.units import parse_seconds

from . import search_options as told
from .console import error_console, say
from .drawing import draw, picture_beside
from .inputs import Cluster, Model, batch_sizes, fraction, memory_limit
from .options import LoraSettings, TaskName, examples

if TYPE_CHECKING:
    from galvatron.search import Change, Limits, SearchResult
    from galvatron.search.sensitivity import SearchAgain


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        epilog=examples(
            "galvatron search --model model.json --cluster hardware.json --memory 36GiB --global-batch-size 64",
            "galvatron search --model llama3.1-405b --cluster h100:2048x8 --seq-len 8192 --global-batch-size 2048",
            "galvatron search --model llama2-7b --cluster rtx4090:1x8 --seq-len 4096 --global-batch-size 64-512",
            "galvatron search --model mixtral-8x7b --cluster h100:4x8 --link inter=25GB/s --seq-len 4096"
            " --global-batch-size 256 --space all --fix pp=4 --max tp=8 --what-if",
            "galvatron search --model llama2-7b --cluster a100:1x8 --seq-len 4096 --global-batch-size 64 --json",
            "galvatron search --model llama3.1-8b --cluster rtx4090:1x2 --seq-len 4096 --global-batch-size 8"
            " --lora r=16",
            "galvatron search --model deepseek-v3 --cluster h100:128x8 --seq-len 4096 --global-batch-size 1024"
            " --space all --time-limit 30s --gap 1%",
        )
    )(search)


def search(
    model: told.ModelName,
    cluster: told.ClusterName,
    global_batch_size: told.BatchSizes,
    link: told.Links = None,
    memory: told.Memory = None,
    seq_len: told.SeqLen = None,
    precision: told.Precision = None,
    grad_reduce_dtype: told.ReduceDtype = "fp32",
    space: told.SpaceName = "runtime",
    fix: told.Fix = None,
    forbid: told.Forbid = None,
    at_most: told.AtMost = None,
    baselines: told.Baselines = True,
    what_if: told.WhatIf = False,
    gap: told.Gap = "0%",
    time_limit: told.TimeLimit = None,
    lora: LoraSettings = None,
    task: TaskName = None,
    capacity_factor: told.CapacityFactor = None,
    out: told.Out = Path("plan.json"),
    as_json: told.AsJson = False,
) -> None:
    """Find the fastest plan that fits in memory, layer by layer, and explain it.

    Exact over its space in an additive model of the step: the plan carries that model's lower bound, which no plan of
    the space beats.  Names of models and devices stand for estimated profiles; files for measured ones.  A picture of
    the predicted step goes beside the plan (plan.svg).  Ctrl-C or the time limit ends the search with the best plan so
    far and its gap.
    """
    from galvatron.search import Limits

    picture = picture_beside(out, model, cluster)
    limits = Limits.parse(space, fix or (), forbid or (), at_most or ())
    within, seconds = fraction(gap), None if time_limit is None else parse_seconds(time_limit)
    batches, where = batch_sizes(global_batch_size), Cluster.of(cluster, link or [])
    limit = memory_limit(memory, where.hardware)
    adapters = None if lora is None else Lora.parse(lora)
    what = Model(model, seq_len, precision, _tp_asked(limits), adapters, task, capacity_factor)
    profile = what.profile(where.hardware)
    with error_console().status("searching", spinner="line") as status:
        job = _Search(what, batches, grad_reduce_dtype, limits, within, seconds, lambda line: status.update(line))
        result = job.best(profile, where, limit, baselines=baselines)
        changes = job.what_would_help(result, where) if what_if else ()
    result.plan.save(out)
    if as_json:
        from galvatron.report import summary

        typer.echo(json.dumps(summary(result, changes), indent=2, allow_nan=False))  # ASCII: for any pipe
    else:
        show(result, changes)
        if profile.spec.tower is not None:
            seq_len = result.plan.seq_len
            tokens = profile.spec.tower.image_tokens(seq_len)
            say(f"Images: one square one a text is assumed, for which {tokens:,} of {seq_len:,} tokens stand")
        draw(result.plan, profile, where.hardware, picture, limits.runtime)
        say(f"wrote {out}")


def _tp_asked(limits: Limits) -> int:
    """The largest tp that the limits name."""
    named = [*limits.fix.items(), *limits.at_most.items()]
    return max((v for name, v in named if name.rpartition(".")[2] == "tp" and isinstance(v, int)), default=1)


@dataclass(frozen=True)
class _Search:
    """One search with everything fixed but the cluster and its memory."""

    model: Model
    batch_sizes: list[int]
    grad_reduce_dtype: ReduceDtype
    limits: Limits
    gap: float
    time_limit_s: float | None
    progress: Callable[[str], None]

    def best(
        self, profile: ModelProfile, where: Cluster, memory_limit_bytes: int | None, *, baselines: bool
    ) -> SearchResult:
        """The search; an InfeasibleError says how many nodes would do."""
        try:
            return self.find(profile, where.hardware, memory_limit_bytes, baselines=baselines)
        except InfeasibleError as error:
            raise _with_remedy(error, self.again, where, memory_limit_bytes) from None

    def what_would_help(self, result: SearchResult, where: Cluster) -> Sequence[Change]:
        """What more memory, network and nodes would bring; nothing where somebody has no patience for it."""
        from galvatron.search import sensitivity

        if not result.stopped:
            with contextlib.suppress(KeyboardInterrupt):  # the plan is there already
                return sensitivity(self.again, where.hardware, result.memory_limit_bytes, where.shape)
        return ()

    def find(
        self,
        profile: ModelProfile,
        hardware: HardwareProfile,
        memory_limit_bytes: int | None,
        *,
        num_candidates: int = 8,
        baselines: bool = True,
    ) -> SearchResult:
        """The search."""
        from galvatron.search import search as find

        return find(
            profile,
            hardware,
            global_batch_size=self.batch_sizes,
            seq_len=self.model.seq_len,
            precision=self.model.precision,
            grad_reduce_dtype=self.grad_reduce_dtype,
            memory_limit_bytes=memory_limit_bytes,
            limits=self.limits,
            num_candidates=num_candidates,
            baselines=baselines,
            gap=self.gap,
            time_limit_s=self.time_limit_s,
            progress=self.progress,
        )

    def again(self, hardware: HardwareProfile, memory_limit_bytes: int) -> SearchResult:
        """The same on another cluster, for its best plan alone."""
        profile = self.model.profile(hardware)
        return self.find(profile, hardware, memory_limit_bytes, num_candidates=1, baselines=False)


def _with_remedy(error: InfeasibleError, again: SearchAgain, where: Cluster, limit: int | None) -> InfeasibleError:
    """The same with how many of these nodes would do, where a preset can tell."""
    from galvatron.search import what_would_fit

    if where.shape is None or not error.constraint.startswith("memory"):
        return error
    enough = what_would_fit(again, limit or where.hardware.device.memory_bytes, where.shape)
    found = f"{enough} would do" if enough else "16 times the nodes would not do"
    return InfeasibleError(f"{error}; {found}", constraint=error.constraint)


def search_for_job(job: Job, model: ModelProfile, hardware: HardwareProfile) -> SearchResult:
    """The search that a job asks for."""
    from galvatron.search import search as find

    train = job.train
    return find(
        model,
        hardware,
        global_batch_size=train.global_batch_size,
        seq_len=train.seq_len,
        precision=train.precision,
        grad_reduce_dtype=train.grad_reduce_dtype,
        memory_limit_bytes=memory_limit(job.search.memory, hardware),
        limits=limits_of(job.search),
    )


def limits_of(section: SearchSection) -> Limits:
    """The job file's limits, within what the runtime can run."""
    from galvatron.search import Limits

    fixed = {"pp": section.pp, "num_microbatches": section.num_microbatches}
    return Limits(
        fix={name: value for name, value in fixed.items() if value is not None},
        at_most={} if section.max_tp is None else {"tp": section.max_tp},
    )


def show(result: SearchResult, changes: Sequence[Change] = ()) -> None:
    """The plan and why it was chosen."""
    from galvatron.report import explain

    say(explain(result, changes))
