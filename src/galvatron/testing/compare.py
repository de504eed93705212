"""What one rank of a parity check does: train under the plan, compare each piece with the reference.

Takes the path of a saved Reference and a plan; gives the rank's deviations and holdings, no tensors.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field

from galvatron.core.model import Precision
from galvatron.core.records import Record
from galvatron.parallelize import LocalParameter, ParallelModel, init_world, parallelize
from galvatron.parallelize.layers import compile
from galvatron.parallelize.losses.scale import LossScale
from galvatron.plan import Plan

from .coverage import Box, Holding, find_gaps
from .reference import FP16_SCALE, Reference, Step, Tensors

KINDS = ("loss", "grad_norm", "gradient", "parameter", "exp_avg", "exp_avg_sq", "final_loss")
TOLERANCES: dict[Precision, dict[str, float]] = {
    "fp32": dict(zip(KINDS, (1e-5, 1e-5, 1e-5, 1e-5, 1e-5, 2e-5, 1e-5), strict=True)),
    "fp16": dict(zip(KINDS, (5e-4, 5e-3, 3e-2, 1e-2, 3e-2, 6e-2, 1e-3), strict=True)),
    "bf16": dict(zip(KINDS, (4e-3, 4e-2, 0.24, 0.08, 0.24, 0.48, 8e-3), strict=True)),
}
"""Largest allowed error of each kind, relative to the largest magnitude in the reference's whole tensor.

float32 rounds at 6e-8; sums of some hundred terms taken in another order, through 4 to 8 layers, leave about
1e-6.  exp_avg_sq is quadratic in the gradient, so its relative error doubles.  Parameters obey the same
bound because the recipe's eps keeps AdamW from amplifying rounding (see ``reference.Recipe``).
[Empirical: November 2026, CPU, tiny models: worst 2e-7 of losses and norms, 4e-6 of gradients, 1e-6 of parameters.]

fp16 rounds at 5e-4, 2^13 times as coarsely, and bf16 eight times as coarsely as that.
[Empirical: likewise, fp16: worst 8e-5 of losses, 1e-3 of norms, 1e-2 of gradients, 4e-3 of parameters; bf16 7e-4, 5e-3,
7e-2 and 9e-3.]
"""


class Deviation(Record):
    """The largest error of one tensor on one rank; ``step`` counts from 0, -1 means after the last step."""

    kind: str
    name: str
    step: int
    rank: int
    precision: Precision = "fp32"
    error: float = Field(allow_inf_nan=True)

    @property
    def ok(self) -> bool:
        """Whether it is within its kind's tolerance (not a number never is)."""
        return self.error <= self.tolerance

    @property
    def tolerance(self) -> float:
        """Of its kind in its precision."""
        return TOLERANCES[self.precision][self.kind]

    def __str__(self) -> str:
        when = "at the end" if self.step < 0 else f"in step {self.step}"
        what = f"{self.kind} of {self.name}" if self.name else self.kind
        return f"{what} {when} on rank {self.rank}: {self.error:.2e} (tolerance {self.tolerance:.0e})"


@dataclass(frozen=True, kw_only=True)
class RankFindings:
    """What a rank reports: the worst deviation of each kind and all intolerable ones, holdings, complaints.

    ``scalars`` are the losses and gradient norms it saw, which must be the same on all ranks.
    """

    deviations: tuple[Deviation, ...]
    holdings: tuple[Holding, ...]
    problems: tuple[str, ...]
    scalars: tuple[float, ...]


def compare_on_rank(path: Path, plan: Plan, engine: str | None = None) -> RankFindings:
    """Run ``plan`` on this rank of an initialised world against the reference saved at ``path``."""
    reference = Reference.load(path)
    torch.backends.cudnn.allow_tf32 = False  # as of products, where that is torch's default
    world = init_world("cuda" if dist.get_backend() == "nccl" else "cpu")
    with _compiling_by(engine):
        model = parallelize(reference.model(), plan, world=world, compile=engine is not None)
    if model.loss_scale is not None:
        model.loss_scale = LossScale(scale=FP16_SCALE)
    trained = {p.tensor: p.travels_with for p in model.local_parameters if p.tensor.requires_grad}
    hosted = {tensor: unit for tensor, unit in trained.items() if unit is not None}
    fused = any(strategy.offload != "none" for strategy in plan.strategies())
    optimizer = reference.recipe.optimizer(list(trained), hosted, fused=fused)
    deviations: list[Deviation] = []
    scalars: list[float] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "FSDP2-wrapped module")  # whose hooks it may lose
        for index, step in enumerate(reference.steps):
            found, seen = _train_step(model, optimizer, step, index, reference.recipe.max_grad_norm)
            deviations += found
            scalars += seen
    inputs: dict[str, Any] = dict(reference.steps[0].inputs)
    scalars.append(float(model.evaluate(labels=reference.steps[0].labels, **inputs)))
    deviations.append(_scalar("final_loss", -1, scalars[-1], reference.final_loss))
    deviations += _final_state(model.local_parameters, optimizer, reference)
    held = (deviation.model_copy(update={"precision": reference.precision}) for deviation in deviations)
    return RankFindings(
        deviations=tuple(worth_reporting(held)),
        holdings=tuple(h for parameter in model.local_parameters for h in _holdings(parameter)),
        problems=tuple(_local_problems(model.local_parameters)),
        scalars=tuple(scalars),
    )


@contextmanager
def _compiling_by(engine: str | None) -> Iterator[None]:
    before, compile.BACKEND = compile.BACKEND, engine or compile.BACKEND
    try:
        yield
    finally:
        compile.BACKEND = before


def worth_reporting(deviations: Iterable[Deviation]) -> Iterator[Deviation]:
    """The intolerable deviations, and the worst tolerable one of each kind."""
    tolerable: dict[str, Deviation] = {}
    for deviation in deviations:
        if not deviation.ok:
            yield deviation
        elif deviation.kind not in tolerable or deviation.error > tolerable[deviation.kind].error:
            tolerable[deviation.kind] = deviation
    yield from tolerable.values()


def own_error(reference: Reference, exact: Reference) -> Deviation:
    """The worst error, by its tolerance, of one process' run against the same steps in float64."""

    def off(kind: str, name: str, step: int, values: Any, truth: Any) -> Deviation:
        wide = torch.as_tensor(truth).double()
        difference = (torch.as_tensor(values).double() - wide).abs().max().item()
        error = _relative(difference, wide.abs().max().item())
        return Deviation(kind=kind, name=name, step=step, rank=0, precision=reference.precision, error=error)

    def found() -> Iterator[Deviation]:
        for index, (step, truth) in enumerate(zip(reference.steps, exact.steps, strict=True)):
            yield off("loss", "", index, step.loss, truth.loss)
            yield off("grad_norm", "", index, step.grad_norm, truth.grad_norm)
            for name, gradient in step.gradients.items():
                yield off("gradient", name, index, gradient, truth.gradients[name])
        for name, average in reference.exp_avg.items():
            yield off("parameter", name, -1, reference.parameters[name], exact.parameters[name])
            yield off("exp_avg", name, -1, average, exact.exp_avg[name])
            yield off("exp_avg_sq", name, -1, reference.exp_avg_sq[name], exact.exp_avg_sq[name])
        yield off("final_loss", "", -1, reference.final_loss, exact.final_loss)

    return max(found(), key=lambda own: own.error / own.tolerance)


def _train_step(
    model: ParallelModel, optimizer: torch.optim.AdamW, step: Step, index: int, max_grad_norm: float | None
) -> tuple[list[Deviation], list[float]]:
    model.zero_grad()
    inputs: dict[str, Any] = dict(step.inputs)
    loss = float(model.train_step(labels=step.labels, **inputs))
    scale = 1.0 if model.loss_scale is None else model.loss_scale.scale
    deviations = [_scalar("loss", index, loss, step.loss)]
    for parameter in model.local_parameters:
        gradient = parameter.tensor.grad
        error = math.inf  # no gradient at all
        if parameter.name not in step.gradients:
            error = 0.0 if gradient is None else math.inf
        elif gradient is not None and gradient.shape == parameter.tensor.shape:
            error = _error(gradient / scale, parameter, step.gradients)
        deviations.append(_deviation("gradient", parameter.name, index, error))
    grad_norm = float(model.clip_grad_norm_(max_grad_norm))
    deviations.append(_scalar("grad_norm", index, grad_norm, step.grad_norm))
    optimizer.step()
    return deviations, [loss, grad_norm]


def _final_state(
    parameters: list[LocalParameter], optimizer: torch.optim.AdamW, reference: Reference
) -> Iterator[Deviation]:
    for parameter in parameters:
        if parameter.name not in reference.exp_avg:  # frozen, or nothing that the loss depends on
            moved = _error(parameter.tensor, parameter, reference.initial)
            yield _deviation("parameter", parameter.name, -1, math.inf if moved else 0.0)
            continue
        state = optimizer.state[parameter.tensor]
        for kind, local, truth in (
            ("parameter", parameter.tensor.detach(), reference.parameters),
            ("exp_avg", state["exp_avg"], reference.exp_avg),
            ("exp_avg_sq", state["exp_avg_sq"], reference.exp_avg_sq),
        ):
            yield _deviation(kind, parameter.name, -1, _error(local, parameter, truth))


def _error(local: torch.Tensor, parameter: LocalParameter, truth: Tensors) -> float:
    """Largest absolute error over the pieces, relative to the largest magnitude of the whole true tensor."""
    expected = truth[parameter.name]
    scale = expected.abs().max().item()
    worst = 0.0
    for piece in parameter.pieces:
        mine = local[_slices((piece.local_offset, piece.size))].cpu()
        theirs = expected[_slices((piece.global_offset, piece.size))]
        if mine.numel():
            worst = max(worst, _relative((mine - theirs).abs().max().item(), scale))
    return worst


def _relative(difference: float, scale: float) -> float:
    if difference == 0.0:
        return 0.0
    # NaN would lose every comparison and go unseen
    return math.inf if scale == 0.0 or math.isnan(difference / scale) else difference / scale


def _scalar(kind: str, step: int, value: float, truth: float) -> Deviation:
    return _deviation(kind, "", step, _relative(abs(value - truth), abs(truth)))


def _deviation(kind: str, name: str, step: int, error: float) -> Deviation:
    return Deviation(kind=kind, name=name, step=step, rank=dist.get_rank(), error=error)


def _holdings(parameter: LocalParameter) -> Iterator[Holding]:
    """What this rank has of a parameter, apart where other ranks hold only some of it too."""
    for copies in {piece.copies for piece in parameter.pieces}:
        pieces = [piece for piece in parameter.pieces if piece.copies == copies]
        values = [parameter.tensor.detach()[_slices((p.local_offset, p.size))].flatten().cpu() for p in pieces]
        yield Holding(
            rank=dist.get_rank(),
            name=parameter.name,
            global_shape=tuple(parameter.global_shape),
            boxes=tuple((tuple(piece.global_offset), tuple(piece.size)) for piece in pieces),
            replicas=parameter.replicas * copies,
            is_primary=parameter.is_primary and pieces[0].is_first,
            checksum=zlib.crc32(torch.cat(values).view(torch.uint8).numpy().tobytes()),
        )


def _local_problems(parameters: list[LocalParameter]) -> Iterator[str]:
    for parameter in parameters:
        boxes = [(tuple(piece.local_offset), tuple(piece.size)) for piece in parameter.pieces]
        gap = find_gaps(tuple(parameter.tensor.shape), boxes)
        if gap:
            yield f"{parameter.name}: rank {dist.get_rank()}'s local tensor: {gap}"


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(*box, strict=True))
