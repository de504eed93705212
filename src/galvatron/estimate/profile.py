"""A model's profile without the model: what each unit would take on a device, by formula.

Takes a ModelSpec and a device; gives a ModelProfile labelled ``estimated``.  Knows nothing of clusters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

from galvatron.core.errors import ConfigError
from galvatron.core.hardware import Device
from galvatron.core.model import ENDS, RECOMPUTES, ModelSpec, Precision, Recompute, UnitName
from galvatron.core.model_profile import ActivationSample, ComputeSample, ModelProfile

from .activations import embedding_activations, head_activations, layer_activations
from .compute import Rates, embedding_sample, head_sample, layer_sample, update_bytes
from .devices import Preset, preset
from .tower import tower_bytes, tower_seconds

TP_DEGREES = (1, 2, 4, 8, 16, 32, 64)


def estimate_model(
    spec: ModelSpec,
    device: str | Preset | Device,
    *,
    seq_len: int,
    precision: Precision = "bf16",
    tp_degrees: Iterable[int] | None = None,
    max_batch: int = 64,
    compiled: bool | None = None,
) -> ModelProfile:
    """Seconds and bytes of every unit of ``spec`` on one rank of ``device``.

    Args:
        spec: the model.
        device: a preset, its name, or the device of a hardware profile: of a measured one its matrix rate counts.
        seq_len: tokens of a sequence; of vision models patches.
        precision: compute dtype.
        tp_degrees: tensor-parallel degrees, by default powers of two up to 64; those that a unit's cuts or
            tokens refuse are left out.
        max_batch: most sequences that a rank computes at once.
        compiled: whether layers are, as they will be in training; by default on CUDA alone.

    Raises:
        ConfigError: ``seq_len`` does not suit the model, no preset is of that name, or no rate of that precision is
            known.
    """
    problem = spec.sequence_problem(seq_len)
    if problem:
        raise ConfigError(problem)
    found = preset(device) if isinstance(device, str) else device
    rates = Rates.of(found, precision)
    degrees = sorted({1, *(TP_DEGREES if tp_degrees is None else tp_degrees)})
    if compiled is None:
        compiled = isinstance(found, Preset) or found.type == "cuda"
    units = [(unit, tp) for unit, tp in itertools.product(spec.units, degrees) if _cuts(spec, unit, tp, seq_len)]
    return ModelProfile(
        spec=spec,
        device=found.product if isinstance(found, Preset) else found.name,
        precision=precision,
        seq_len=seq_len,
        origin="estimated",
        compiled=compiled,
        compute=tuple(
            _compute(spec, unit, tp, batch, seq_len, rates, compiled)
            for (unit, tp), batch in itertools.product(units, batches(max_batch))
        ),
        activations=tuple(
            _activations(spec, unit, tp, recompute, seq_len, precision, compiled)
            for (unit, tp), recompute in itertools.product(units, RECOMPUTES)
            if unit not in ENDS or recompute == "none"
        ),
        optimizer_s_per_parameter=update_bytes(rates.element_bytes) / rates.bytes_per_s,
    )


def batches(max_batch: int) -> tuple[int, ...]:
    """1, 2, 4 … and at last ``max_batch`` itself."""
    powers = (2**i for i in range(max_batch.bit_length()))
    return (*(n for n in powers if n < max_batch), max_batch)


def _cuts(spec: ModelSpec, unit: UnitName, tp: int, seq_len: int) -> bool:
    """Whether the unit's parameters and tokens can be cut ``tp`` ways (see ``core.model.Cut``)."""
    kind = {ENDS[0]: spec.layers[0], ENDS[1]: spec.layers[-1]}.get(unit) or spec.kind(unit)
    cuts = [p.cut for p in spec.unit(unit).parameters if p.cut is not None]
    refused = any(cut.misfit(tp) is not None or cut.leaves_ranks_empty(tp) for cut in cuts)
    even = kind.tokens(seq_len) % tp == 0 or tp <= spec.patches(kind, seq_len)
    return even and not refused


def _compute(
    spec: ModelSpec, unit: UnitName, tp: int, batch: int, seq_len: int, rates: Rates, compiled: bool
) -> ComputeSample:
    if unit == ENDS[0]:
        sample = embedding_sample(spec, tp, batch, seq_len, rates)
        forward_s, backward_s = tower_seconds(spec, batch, seq_len, rates)
        taken = {"forward_s": sample.forward_s + forward_s, "backward_s": sample.backward_s + backward_s}
        return sample.model_copy(update=taken)
    if unit == ENDS[1]:
        return head_sample(spec, tp, batch, seq_len, rates)
    return layer_sample(spec.kind(unit), spec.family, tp, batch, seq_len, rates, compiled=compiled)


def _activations(
    spec: ModelSpec, unit: UnitName, tp: int, recompute: Recompute, seq_len: int, precision: Precision, compiled: bool
) -> ActivationSample:
    if unit == ENDS[0]:
        sample = embedding_activations(spec, tp, seq_len, precision)
        saved, workspace = tower_bytes(spec, seq_len, precision)
        most = max(sample.workspace_bytes_per_sequence, math.ceil(workspace))
        kept = {"bytes_per_sequence": sample.bytes_per_sequence + math.ceil(saved)}
        return sample.model_copy(update={**kept, "workspace_bytes_per_sequence": most})
    if unit == ENDS[1]:
        return head_activations(spec, tp, seq_len, precision)
    return layer_activations(spec.kind(unit), spec.family, tp, recompute, seq_len, precision, compiled=compiled)
