"""The certificate: a plan computes what one process computes.

Takes a model and a plan; gives a ParityReport.  The reference is Hugging Face's own unmodified model,
trained by one process in the plan's precision; the plan runs on as many processes as it has devices, over
gloo or, with a pool on GPUs, NCCL.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from galvatron.core.errors import PlanError
from galvatron.core.model import Precision
from galvatron.core.records import Record
from galvatron.models.lora import wrapped
from galvatron.plan import Plan

from .compare import KINDS, Deviation, RankFindings, compare_on_rank, own_error, worth_reporting
from .coverage import check_holdings
from .models import tiny_model
from .pool import Pool
from .reference import Recipe, Reference, train_reference

MAX_LINES = 12
"""Findings that ``explain`` spells out."""
NEAR = 10
"""How many times its tolerance an error is at most that rounding may explain."""
DRAWS = 3
"""Batches (and drawn weights) that a plan is tried with, until one decides."""


class ParityReport(Record):
    """How far a plan's run was from the reference's.

    Attributes:
        plan: the plan that was run.
        deviations: all intolerable errors, and the worst tolerable one of each kind.
        problems: everything else that was wrong: parts missing or held twice, replicas that differ.
        exact: whether the reference computed in float64.
        undecided: of each draw that was put aside, how far one process itself was from float64.
    """

    plan: Plan
    deviations: tuple[Deviation, ...]
    problems: tuple[str, ...] = ()
    exact: bool = False
    undecided: tuple[Deviation, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every error is within its tolerance and nothing else was wrong."""
        return not self.problems and all(deviation.ok for deviation in self.deviations)

    @property
    def worst(self) -> dict[str, float]:
        """The largest relative error of each kind (see ``TOLERANCES``)."""
        return {kind: max((d.error for d in self.deviations if d.kind == kind), default=0.0) for kind in KINDS}

    @property
    def is_near(self) -> bool:
        """Whether it fails by no more than what two float32 runs may differ by."""
        return not self.ok and not self.problems and all(d.error <= NEAR * d.tolerance for d in self.deviations)

    def explain(self) -> str:
        """The verdict for people: worst errors, and what failed first."""
        errors = ", ".join(f"{kind} {error:.1e}" for kind, error in self.worst.items())
        against = " against float64" if self.exact else ""
        lines = [f"parity {'holds' if self.ok else 'FAILS'}{against}: {errors}"]
        lines += [f"  a draw decided nothing, one process itself is off float64: {own}" for own in self.undecided]
        if self.ok:
            return "\n".join(lines)
        failed = sorted((d for d in self.deviations if not d.ok), key=lambda d: (d.step < 0, d.step))
        findings = [*self.problems, *map(str, failed)]
        lines += [f"  {finding}" for finding in findings[:MAX_LINES]]
        if len(findings) > MAX_LINES:
            lines.append(f"  and {len(findings) - MAX_LINES} more")
        return "\n".join([*lines, self.plan.describe(), self.plan.to_json()])


def parity(
    model: PreTrainedModel | PretrainedConfig | nn.Module,
    plan: Plan,
    *,
    recipe: Recipe | None = None,
    pool: Pool | None = None,
) -> ParityReport:
    """Certify that ``plan`` trains ``model`` exactly as one process would.

    Both start from the same weights and take a few AdamW steps on the same random tokens, on the CPU, in the
    precision of the plan, which decides how near they must be (``compare.TOLERANCES``).  Compared on every rank,
    piece by piece: the loss, the gradient norm and every gradient of every step, every parameter and both AdamW
    states at the end, and an evaluation of the result.  Where float32 fails narrowly, the same steps in float64 decide
    within the same tolerances; where one process itself is off float64 by more than these, other batches do
    (``decided``).  Also checked: that the parts cover every parameter exactly once and that
    replicas end with the same bits.

    Args:
        model: a Hugging Face model that galvatron trains, of any task, without dropout, perhaps with a LoRA
            adapter by peft; or its config, for drawn weights.  One process trains a copy of it, so a large model is
            better certified by a twin: the same config with smaller sizes and the same number of layers.
        plan: any plan for it, whose gradients are reduced in fp32; ``plan.world_size`` processes run on this machine.
        recipe: how the steps are trained; default three steps of AdamW without clipping.
        pool: workers to use, on the CPU or on GPUs; by default new ones on the CPU, ended afterwards.

    Raises:
        PlanError: the plan breaks a rule, or reduces gradients in bf16.
        ConfigError: the model is of no supported family, or has dropout.
        WorkerError: a rank failed.
    """
    if isinstance(model, PretrainedConfig):
        model = tiny_model(model)
    inner = wrapped(model)
    assert isinstance(inner, PreTrainedModel)
    _check_reduction(plan)
    recipe = replace(recipe or Recipe(), num_microbatches=plan.num_microbatches)
    with (
        tempfile.TemporaryDirectory(prefix="galvatron-parity-") as folder,
        nullcontext(pool) if pool else Pool() as workers,
    ):

        def reference(draw: int, exact: bool) -> Path:
            path = Path(folder) / f"{draw}-{exact}.pt"
            if not path.exists():
                drawn = replace(recipe, seed=recipe.seed + draw)
                of_batch = (plan.global_batch_size, plan.seq_len, drawn, plan.precision)
                train_reference(inner, *of_batch, exact=exact).save(path)
            return path

        return decided(reference, lambda path: parity_with(path, plan, workers), plan.precision)


def decided(
    reference: Callable[[int, bool], Path], held: Callable[[Path], ParityReport], precision: Precision
) -> ParityReport:
    """What ``held`` finds against ``reference(draw, False)``, of the first draw that decides.

    Of a gradient that all but cancels two float32 runs keep few digits, each other ones: where float32 fails narrowly,
    float64 (``reference(draw, True)``) decides.  And where one process itself is off float64 by more than the
    tolerances, as where a ReLU is at its kink, any other run in its precision may be too: the next draw decides.  A
    wrong plan is wrong with each of them, and the last draw counts as it is.
    """
    undecided: list[Deviation] = []
    for draw in range(DRAWS):
        report = held(reference(draw, False)).model_copy(update={"undecided": tuple(undecided)})
        if report.ok or report.problems:
            return report
        if precision == "fp32" and report.is_near:
            exact = held(reference(draw, True))
            if exact.ok:
                return exact.model_copy(update={"exact": True, "undecided": tuple(undecided)})
        own = own_error(Reference.load(reference(draw, False)), Reference.load(reference(draw, True)))
        if own.ok:
            return report
        undecided.append(own)
    return report


def parity_with(path: Path, plan: Plan, pool: Pool, *, engine: str | None = None) -> ParityReport:
    """As ``parity``, against a reference of the plan's batch shape and precision that was saved at ``path``.

    ``engine``: torch.compile's, where the plan's layers shall be compiled.
    """
    findings = pool.run(compare_on_rank, path, plan, engine, world_size=plan.world_size)
    shapes = {name: tuple(tensor.shape) for name, tensor in Reference.load(path).parameters.items()}
    return ParityReport(
        plan=plan,
        deviations=tuple(worth_reporting(d for finding in findings for d in finding.deviations)),
        problems=tuple(_problems(findings, shapes)),
    )


def _problems(findings: list[RankFindings], shapes: dict[str, tuple[int, ...]]) -> Iterable[str]:
    for finding in findings:
        yield from finding.problems
    if len({finding.scalars for finding in findings}) > 1:
        yield f"ranks report different losses and norms: {[finding.scalars for finding in findings]}"
    yield from check_holdings((holding for finding in findings for holding in finding.holdings), shapes)


def _check_reduction(plan: Plan) -> None:
    if plan.grad_reduce_dtype != "fp32":
        raise PlanError(
            f"parity is held against one process, which reduces nothing, but the plan has "
            f"grad_reduce_dtype={plan.grad_reduce_dtype}; set it to fp32"
        )
