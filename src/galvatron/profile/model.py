"""All that the search needs to know of a model on this cluster: ``model.json``.

Takes a Hugging Face config and an initialised world; gives a ModelProfile, equal on all ranks.  Weights are
never loaded: units are measured one at a time with random ones.
"""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch.distributed as dist
from transformers import PretrainedConfig

from galvatron.core.errors import ConfigError
from galvatron.core.lora import Lora
from galvatron.core.model import ENDS, RECOMPUTES, LayerKind, ModelSpec, Precision, UnitName
from galvatron.core.model_profile import ActivationSample, ComputeSample, ModelProfile
from galvatron.core.units import format_bytes, format_seconds
from galvatron.models import build_spec, family_of, model_to_train
from galvatron.parallelize.layers.compile import compiles
from galvatron.parallelize.layers.fp8 import check_fp8, fp8_problem
from galvatron.parallelize.processes.world import World
from galvatron.parallelize.sharding.fsdp import DTYPES
from galvatron.plan import LayerStrategy, StageAxes, check_strategy
from galvatron.plan.axes import divisors

from .activations import count_activations
from .compute import device_name
from .device_memory import context_bytes
from .layers import Measured, measure_attention, measure_unit
from .optimizer import measure_optimizer
from .timing import Budget, Progress, agree
from .units import UnitShape

SWEEPS = {"cpu": 3, "cuda": 1}  # what disturbs a CPU for a second leaves a GPU alone, where each sweep compiles anew
Sample = TypeVar("Sample", ComputeSample, ActivationSample)


def profile_model(
    config: PretrainedConfig,
    world: World,
    *,
    seq_len: int,
    precision: Precision = "fp32",
    max_batch: int = 8,
    tp_degrees: Iterable[int] | None = None,
    freeze: Collection[str] = (),
    budget_s: float = 20.0,
    compile: bool | None = None,
    fp8: bool = False,
    lora: Lora | None = None,
    progress: Progress | None = None,
) -> ModelProfile:
    """Collective: measure and count every unit of the model at every tensor cut.

    Args:
        config: of a supported family.
        world: whose ranks measure at once.
        seq_len: tokens of a sequence in training; of images what they are to the model.
        precision: compute dtype; parameters stay fp32.
        max_batch: most sequences a rank will compute at once (its part of a microbatch).
        tp_degrees: to measure; by default all that a stage of this world can use.  Degrees that a unit cannot
            be cut by are left out, by the rules that plans obey.
        freeze: parameters that are not trained, by name or pattern (``models.freeze``); units are measured so.
        budget_s: about how many seconds the timing may take; it limits batches and repeats, never cuts.
        compile: whether layers are compiled, as they will be in training; by default on CUDA alone.
        fp8: whether their products are made in float8, likewise.
        lora: adapters in its layers, beside which all else is frozen.
        progress: told of every unit measured, on every rank.

    Raises:
        ConfigError: the family has no record, ``seq_len`` is not one of the model's, or a pattern of ``freeze``
            matches nothing.
    """
    spec = build_spec(config, freeze=freeze, lora=lora)
    if problem := spec.sequence_problem(seq_len):
        raise ConfigError(problem)
    if fp8:
        check_fp8(model_to_train(config, freeze, lora), family_of(config), world.device, precision)
        for kind in spec.layers:
            if problem := fp8_problem(kind, 1, seq_len):
                raise ConfigError(problem)
    compiled = compiles(compile, world.device, spec)
    whole = UnitShape(config, spec, ENDS[0], 1, seq_len, DTYPES[precision], compiled, fp8, lora)
    shapes = _shapes(whole, tp_degrees or _stacked_degrees(world.world_size))
    measured = _measure(shapes, precision, world, max_batch, budget_s, progress)
    layer = next(shape for shape in shapes if shape.name not in ENDS)
    attention = measure_attention(layer, precision, world)
    optimizer_s = measure_optimizer(spec, world)
    slacks = [unit.slack_fraction for unit in measured if unit.slack_fraction is not None]
    profile = ModelProfile(
        spec=spec,
        device=device_name(world.device),
        precision=precision,
        seq_len=seq_len,
        compiled=compiled,
        fp8=fp8,
        attention_backend=attention,
        compute=tuple(_of_alike(spec, _medians(measured))),
        activations=tuple(_of_alike(spec, _count(shapes, world))),
        optimizer_s_per_parameter=optimizer_s,
        context_bytes=_agreed_context(world),  # all that it is made of is loaded by now
        allocator_slack_fraction=max(slacks, default=None),
    )
    if progress is not None:
        progress(_about_device(profile))
    shared = [profile]
    dist.broadcast_object_list(shared, src=0, device=world.device)
    return shared[0]


def _agreed_context(world: World) -> int | None:
    """Collective: what the rank with the most takes beyond its tensors; None on CPU."""
    own = context_bytes(world.device)
    return None if own is None else int(agree([own], world.device)[0])


def _about_device(profile: ModelProfile) -> str:
    words = [f"attention runs on {profile.attention_backend}"]
    if profile.context_bytes is not None:
        words.append(f"context {format_bytes(profile.context_bytes)}")
    if profile.allocator_slack_fraction is not None:
        words.append(f"allocator's slack {profile.allocator_slack_fraction:.1%}")
    return ", ".join(words)


def _stacked_degrees(world_size: int) -> tuple[int, ...]:
    """Every tp degree that some stage size of the world can stack."""
    return tuple(sorted({degree for n in divisors(world_size) for degree in StageAxes(n).degrees}))


def _shapes(like: UnitShape, degrees: Iterable[int]) -> list[UnitShape]:
    """What to measure, once of kinds that run alike; layers last, so that time left over goes to them."""
    spec, seq_len = like.spec, like.seq_len
    names = [*ENDS, *dict.fromkeys(_first_alike(spec, kind) for kind in spec.layers)]
    return [
        replace(like, name=name, tp=tp)
        for name, tp in itertools.product(names, sorted(set(degrees)))
        if check_strategy(LayerStrategy(tp=tp), name, spec, stage_size=tp, micro_batch_size=1, seq_len=seq_len) is None
        and not (like.fp8 and name not in ENDS and fp8_problem(spec.kind(name), tp, seq_len))
    ]


def _first_alike(spec: ModelSpec, kind: LayerKind) -> UnitName:
    """The first kind that is like ``kind`` in all but name and count, and is reached by the backward as it is.

    Of idle layers, which do not run, the one before them.
    """
    if kind.idle:
        return _first_alike(spec, spec.layers[spec.layers.index(kind) - 1])

    def what(kind: LayerKind) -> tuple[LayerKind, bool]:
        return kind.model_copy(update={"name": "", "count": 1}), spec.is_reached(kind.name)

    return next(other.name for other in spec.layers if what(other) == what(kind))


def _of_alike(spec: ModelSpec, samples: tuple[Sample, ...]) -> Iterator[Sample]:
    """Every sample, and again for each kind that was not measured because another one runs alike."""
    yield from samples
    for kind in spec.layers:
        first = _first_alike(spec, kind)
        if first != kind.name:
            yield from (s.model_copy(update={"unit": kind.name}) for s in samples if s.unit == first)


def _measure(
    shapes: list[UnitShape],
    precision: Precision,
    world: World,
    max_batch: int,
    budget_s: float,
    progress: Progress | None,
) -> list[Measured]:
    """Every shape, several sweeps of them; those after the first end where the budget does."""
    sweeps = SWEEPS[world.device.type]
    budget = Budget(budget_s, sweeps * len(shapes))
    found: list[Measured] = []
    for sweep, shape in itertools.product(range(sweeps), shapes):
        (over_s,) = agree([-budget.left_s()], world.device)
        if sweep > 0 and over_s > 0:
            break
        measured = measure_unit(shape, precision, world, max_batch, budget)
        gc.collect()  # FSDP2's modules refer to themselves
        found.append(measured)
        if progress is not None and sweep == 0 and measured.samples:
            last = measured.samples[-1]
            forward, backward = format_seconds(last.forward_s), format_seconds(last.backward_s)
            progress(f"{shape.name}, tp {shape.tp}, batch {last.batch}: forward {forward}, backward {backward}")
    return found


def _medians(measured: list[Measured]) -> tuple[ComputeSample, ...]:
    """Medians over sweeps, so that what disturbs the machine for a second is outvoted."""
    return tuple(_median([sample for unit in measured for sample in unit.samples]))


def _median(samples: list[ComputeSample]) -> list[ComputeSample]:
    """One sample for every (unit, tp, batch), in their first order."""
    groups: dict[tuple[UnitName, int, int], list[ComputeSample]] = {}
    for sample in samples:
        groups.setdefault((sample.unit, sample.tp, sample.batch), []).append(sample)
    return [
        group[0].model_copy(
            update={
                "forward_s": statistics.median(s.forward_s for s in group),
                "backward_s": statistics.median(s.backward_s for s in group),
                "again_s": {level: statistics.median(s.again_s[level] for s in group) for level in group[0].again_s},
            }
        )
        for group in groups.values()
    ]


def _count(shapes: list[UnitShape], world: World) -> tuple[ActivationSample, ...]:
    """Every rank counts its share of the cases."""
    cases = [
        (shape, recompute)
        for shape in shapes
        for recompute in RECOMPUTES
        if shape.name not in ENDS or recompute == "none"
    ]
    own = [count_activations(*case) for case in cases[world.rank :: world.world_size]]
    gathered: list[Any] = [None] * world.world_size
    dist.all_gather_object(gathered, own)
    return tuple(gathered[i % world.world_size][i // world.world_size] for i in range(len(cases)))
