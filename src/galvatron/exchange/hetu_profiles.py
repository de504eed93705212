"""Hetu-Galvatron's computation and memory files as a ModelProfile.

Takes the two files and the model's shapes; gives ``model.json`` with origin ``imported``.  What the files do not
say follows that system's own assumptions, and nothing here was measured by this project:

* a backward takes twice its forward;
* at tp t, a rank computes a batch of b as fast as one device computes b / t: no tp but 1 was measured;
* ``layertype_other`` is embedding and head together: all of it is the head's, the embedding takes no time (it
  is a lookup and a copy);
* times are noisy enough that a larger batch may read as faster: the times of a unit are made non-decreasing by a
  running maximum over its batches;
* the optimizer takes no time.

Memory: ``tp_activation_per_bsz_dict`` is what a layer saves; recomputed it saves ``checkpoint``, cut by tp where
the file was measured with sequence parallelism, and its backward builds up the rest again as workspace.  What
embedding and head save comes from the first and last stage of a pipeline, and the head takes what is missing to the
measurement without one.  [Checked against the file's own peaks: LLaMA-2-7B with recomputed layers, 1,377 MiB for
one layer and 1,449 MiB for two, come out at 1,431 and 1,463 MiB]
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from galvatron.core.errors import ProfileError
from galvatron.core.model import ENDS, LayerKind, ModelSpec, Precision, UnitName
from galvatron.core.model_profile import ActivationSample, ComputeSample, ModelProfile
from galvatron.core.units import DTYPE_BYTES

from .hetu_files import MIB, Memory, Tokens, read_memory, read_times
from .specs import precision_of_file

BACKWARD_PER_FORWARD = 2.0
"""[Assumed by Hetu-Galvatron: its ``bct_fct_coe``; a linear's two gradients are matmuls of its forward's FLOPs]"""
TOLERANCE = 0.1
"""How far a file's parameters may lie from the model's: allocation granularity takes 1% to 5% in the shared files."""
TOLERANCE_BYTES = 2 * MIB
"""The same for small layers.  [Empirical: Swin-huge's first stage reads 6.5 MiB for 4.7 MiB of parameters: the file
scales up what one of 8 ranks holds, and so counts several times what is not cut, such as masks of windows]"""


def import_model(
    computation: Path,
    memory: Path,
    spec: ModelSpec,
    seq_len: int | None = None,
    precision: Precision | None = None,
) -> ModelProfile:
    """The profile of ``spec`` from a computation and a memory file.

    ``seq_len`` chooses among several measured lengths; ``precision`` is the file name's if left out.

    Raises:
        ProfileError: a file is malformed, lacks a measurement, or is of another model.
    """
    times, measured = read_times(computation), read_memory(memory)
    _check_types(spec, {int(kind) for kind, _ in times if kind.isdigit()}, computation)
    _check_types(spec, {index for index, _ in measured.layers}, memory)
    seq_len = seq_len or _only_seq_len({tokens[0] for kind, tokens in times if kind == "0"}, computation)
    _check_parameters(spec, measured, seq_len, memory)
    degrees = _tp_degrees(spec, measured, seq_len, memory)
    return ModelProfile(
        spec=spec,
        device="A100 (imported)",
        precision=precision or precision_of_file(computation),
        seq_len=seq_len,
        origin="imported",
        compute=tuple(_compute(spec, times, degrees, seq_len, computation)),
        activations=tuple(_activations(spec, measured, degrees, seq_len, memory)),
    )


def _check_types(spec: ModelSpec, types: set[int], path: Path) -> None:
    ours = {index for index, _ in _typed(spec)}
    if types != ours:
        kinds = ", ".join(kind.name for kind in spec.layers)
        raise ProfileError(
            f"{path} has layer types {sorted(types)} but model {spec.name} has {len(ours)} "
            f"kinds of layers ({kinds}); give the model that was measured"
        )


def _typed(spec: ModelSpec) -> list[tuple[int, LayerKind]]:
    """Every kind of layer with its type in the files.

    Kinds of equal sizes, which a table alone tells apart (of positions, in T5's first layers), are of one type.
    """
    sizes = [(k.hidden_size, k.ffn_size, k.num_heads, k.fixed_tokens, k.side_inputs, k.causal) for k in spec.layers]
    types = list(dict.fromkeys(sizes))
    return [(types.index(size), kind) for size, kind in zip(sizes, spec.layers, strict=True)]


def _only_seq_len(lengths: set[int], path: Path) -> int:
    found = sorted(lengths)
    if len(found) != 1:
        raise ProfileError(f"{path} was measured at seq_len {', '.join(map(str, found))}; choose one by --seq-len")
    return found[0]


def _check_parameters(spec: ModelSpec, memory: Memory, seq_len: int, path: Path) -> None:
    for index, kind in _typed(spec):
        ours = kind.num_parameters * DTYPE_BYTES["fp32"]
        theirs = memory.layers[_layer_key(memory, index, kind, seq_len, path)].parameter_size * MIB
        if abs(theirs - ours) > max(TOLERANCE * ours, TOLERANCE_BYTES):
            raise ProfileError(
                f"{path}: layer type {index} has {theirs / MIB:.1f} MiB of parameters but a {kind.name} of model "
                f"{spec.name} has {ours / MIB:.1f} MiB; give the model that was measured"
            )


def _layer_key(memory: Memory, index: int, kind: LayerKind, seq_len: int, path: Path) -> tuple[int, Tokens]:
    key = (index, (kind.tokens(seq_len),))
    if key not in memory.layers:
        found = ", ".join(str(tokens[0]) for other, tokens in sorted(memory.layers) if other == index)
        raise ProfileError(
            f"{path}: layer type {index} needs {key[1][0]} tokens (seq_len {seq_len} of {kind.name}), "
            f"but was measured at {found}; choose that by --seq-len"
        )
    return key


def _other(memory: Memory, place: str, spec: ModelSpec, seq_len: int) -> dict[int, float]:
    """MiB a sample of embedding and head at one place, by tp degree; empty where it was not measured."""
    for tokens in _joint_tokens(spec, seq_len):
        if (place, tokens) in memory.others:
            return memory.others[place, tokens].activation
    return {}


def _joint_tokens(spec: ModelSpec, seq_len: int) -> tuple[Tokens, Tokens]:
    """How files write the length of all layer types together: as a list, or as one number."""
    types = dict(_typed(spec))
    return tuple(types[index].tokens(seq_len) for index in sorted(types)), (seq_len,)


def _tp_degrees(spec: ModelSpec, memory: Memory, seq_len: int, path: Path) -> tuple[int, ...]:
    degrees = set(_other(memory, "off", spec, seq_len))
    for index, kind in _typed(spec):
        degrees &= set(memory.layers[_layer_key(memory, index, kind, seq_len, path)].by_tp)
    if 1 not in degrees:
        raise ProfileError(f"{path} must hold tp 1 of every layer type and of other_memory_pp_off; profile it anew")
    return tuple(sorted(degrees))


def _compute(
    spec: ModelSpec,
    times: dict[tuple[str, Tokens], dict[int, float]],
    degrees: tuple[int, ...],
    seq_len: int,
    path: Path,
) -> Iterator[ComputeSample]:
    for index, kind in _typed(spec):
        yield from _unit_samples(
            kind.name, _times(times, str(index), ((kind.tokens(seq_len),),), path), degrees, seq_len
        )
    ends = _times(times, "other", _joint_tokens(spec, seq_len), path)
    yield from _unit_samples("head", ends, degrees, seq_len)
    yield from _unit_samples("embedding", {1: 0.0}, degrees, seq_len)


def _times(
    times: dict[tuple[str, Tokens], dict[int, float]], kind: str, lengths: tuple[Tokens, ...], path: Path
) -> dict[int, float]:
    for tokens in lengths:
        if (kind, tokens) in times:
            return times[kind, tokens]
    raise ProfileError(
        f"{path} has no layertype_{kind} at {' or '.join(str(list(tokens)) for tokens in lengths)} tokens; "
        "choose a measured length by --seq-len"
    )


def _unit_samples(
    unit: UnitName, by_batch: dict[int, float], degrees: tuple[int, ...], seq_len: int
) -> Iterator[ComputeSample]:
    """Samples of a unit from milliseconds a sample, by batch; see the module for what tp > 1 and noise mean."""
    batches = sorted(by_batch)
    seconds = list(accumulate((1e-3 * batch * by_batch[batch] for batch in batches), max))
    for tp in degrees:
        for batch, forward_s in zip(batches, seconds, strict=True):
            yield ComputeSample(
                unit=unit,
                tp=tp,
                batch=batch * tp,
                seq_len=seq_len,
                forward_s=forward_s,
                backward_s=BACKWARD_PER_FORWARD * forward_s,
            )


def _activations(
    spec: ModelSpec, memory: Memory, degrees: tuple[int, ...], seq_len: int, path: Path
) -> Iterator[ActivationSample]:
    off, first, last = (_other(memory, place, spec, seq_len) for place in ("off", "on_first", "on_last"))
    for tp in degrees:
        embedding = first.get(tp, 0.0)
        head = max(last.get(tp, 0.0), off[tp] - embedding)
        for unit, saved in zip(ENDS, (embedding, head), strict=True):
            yield _sample(unit, tp, seq_len, saved)
        for index, kind in _typed(spec):
            layer = memory.layers[_layer_key(memory, index, kind, seq_len, path)]
            saved = layer.by_tp[tp]
            yield _sample(kind.name, tp, seq_len, saved)
            if layer.recomputed_mib is not None:
                kept = layer.recomputed_mib / (tp if memory.sequence_parallel else 1)
                yield _sample(kind.name, tp, seq_len, kept, max(saved - kept, 0.0), recomputed=True)


def _sample(
    unit: UnitName, tp: int, seq_len: int, saved_mib: float, workspace_mib: float = 0.0, recomputed: bool = False
) -> ActivationSample:
    return ActivationSample(
        unit=unit,
        tp=tp,
        recompute="full" if recomputed else "none",
        seq_len=seq_len,
        fixed_bytes=0,
        bytes_per_sequence=round(saved_mib * MIB),
        workspace_bytes_per_sequence=round(workspace_mib * MIB),
    )
