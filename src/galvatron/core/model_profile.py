"""What a model's units cost on a device (ModelProfile, ``model.json``): seconds and bytes a sample."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from .errors import ConfigError, GalvatronError, ProfileError
from .model import RECOMPUTES, ModelSpec, Origin, Precision, Recompute, UnitName
from .numbers import Bytes, Devices, NonNegative, Positive, Seconds, Sequences, Tokens
from .records import FileRecord, Record
from .words import shown


class ComputeSample(Record):
    """Median forward and backward seconds of one unit at a tp-cut shape, without any communication.

    ``batch`` sequences of ``seq_len`` tokens enter as one of ``tp`` ranks holds them, [batch, seq_len/tp, hidden],
    and weights have that rank's shape; the copies that gathering and scattering make locally are included.
    ``again_s``: how much longer the backward takes at each level of recompute; without a measured one ``full`` takes
    the whole forward.
    """

    unit: UnitName
    tp: Devices
    batch: Sequences
    seq_len: Tokens
    forward_s: Seconds
    backward_s: Seconds
    again_s: dict[Recompute, Seconds] = Field(default_factory=dict)

    def recompute_s(self, recompute: Recompute) -> float:
        """What the backward runs again under ``recompute``; KeyError where it was not measured."""
        return {"none": 0.0, "full": self.forward_s, **self.again_s}[recompute]


class ActivationSample(Record):
    """Bytes that one microbatch leaves behind on a rank of a unit, counted on fake tensors.

    For a local microbatch of b sequences of ``seq_len`` tokens:
    saved bytes = ``fixed_bytes`` + b × ``bytes_per_sequence`` (alive from forward to backward);
    the unit's own forward and backward reach ``workspace_bytes(b)`` above what is saved: a line, or the lesser of two
    lines where a unit works in chunks (the head's logits), of which ``workspace_beyond`` is the second:
    (fixed bytes, bytes per sequence).
    The unit's input (the boundary tensor, cut 1/tp along the sequence) counts where the unit keeps it, its output
    never: it is the next unit's input.  What all layers share (rotary tables) is in the embedding's ``fixed_bytes``.

    ``joints``: what of an embedding's saved bytes is of the ways between stacks, (fixed, a sequence) of each; empty
    where it was not told apart.  ``expert_bytes_per_sequence``: what of a layer's is made within experts.
    """

    unit: UnitName
    tp: Devices
    recompute: Recompute
    seq_len: Tokens
    fixed_bytes: Bytes
    bytes_per_sequence: Bytes
    workspace_bytes_per_sequence: Bytes
    workspace_fixed_bytes: Bytes = 0
    workspace_beyond: tuple[Bytes, Bytes] | None = None
    joints: tuple[tuple[Bytes, Bytes], ...] = ()
    expert_bytes_per_sequence: Bytes = 0

    def workspace_bytes(self, batch: NDArray[np.float64]) -> NDArray[np.float64]:
        """What ``batch`` sequences (any shape, fractions too) take beyond what is saved."""
        first = self.workspace_fixed_bytes + batch * self.workspace_bytes_per_sequence
        if self.workspace_beyond is None:
            return first
        fixed, per_sequence = self.workspace_beyond
        return np.minimum(first, fixed + batch * per_sequence)


class ModelProfile(FileRecord):
    """``model.json``: a model's shapes with its compute and activations, measured unless ``origin`` says otherwise.

    ``optimizer_s_per_parameter`` is the time of one AdamW step divided by the local elements it updates.
    ``compiled``: layers are, which makes them faster and leaner; to be trained in the same way.
    ``fp8``: their products are made in float8, likewise.
    ``capacity_factor``: what an expert takes of an even load when it is trained; samples are of experts that take all.
    ``attention_backend``: which of its kernels torch took for these shapes (flash, cudnn, efficient or math).

    Of CUDA devices, after all units have run: ``context_bytes`` of a rank's device are in use for no tensor (context,
    kernels, the world's communicator, cuBLAS, other processes), and the allocator reserves ``allocator_slack_fraction``
    of what is allocated at the peak beyond it.
    """

    FORMAT: ClassVar[str] = "galvatron.model"
    VERSION: ClassVar[int] = 4
    ERROR: ClassVar[type[GalvatronError]] = ProfileError

    spec: ModelSpec
    device: str
    precision: Precision
    seq_len: Tokens
    origin: Origin = "measured"
    compiled: bool = False
    fp8: bool = False
    capacity_factor: Positive | None = None
    attention_backend: str | None = None
    compute: tuple[ComputeSample, ...]
    activations: tuple[ActivationSample, ...]
    optimizer_s_per_parameter: Seconds = 0.0
    context_bytes: Bytes | None = None
    allocator_slack_fraction: NonNegative | None = None

    @model_validator(mode="after")
    def _samples_are_of_units_once(self) -> Self:
        keys = [("compute", s.unit, s.tp, s.batch, s.seq_len) for s in self.compute]
        keys += [("activations", s.unit, s.tp, s.recompute, s.seq_len) for s in self.activations]  # type: ignore[misc]
        if len(set(keys)) < len(keys):
            twice, _ = Counter(keys).most_common(1)[0]
            raise ValueError(f"two samples of {' '.join(map(str, twice))}; leave out all but one")
        unknown = {str(key[1]) for key in keys} - set(self.spec.units)
        if unknown:
            raise ValueError(f"samples of {shown(min(unknown))}, but the units are {', '.join(self.spec.units)}")
        return self

    @model_validator(mode="after")
    def _levels_have_seconds(self) -> Self:
        timed: dict[tuple[UnitName, int, int], set[Recompute]] = {}
        for measured in self.compute:
            levels = timed.setdefault((measured.unit, measured.tp, measured.seq_len), set(RECOMPUTES))
            levels &= {"none", "full", *measured.again_s}
        for sample in self.activations:
            if sample.recompute not in timed.get((sample.unit, sample.tp, sample.seq_len), RECOMPUTES):
                raise ValueError(
                    f"recompute={sample.recompute} of the {sample.unit} at tp={sample.tp} has bytes but no seconds "
                    "(again_s); measure both, or leave it out"
                )
        return self

    def with_capacity(self, factor: float | None) -> Self:
        """The same of a model whose experts take at most ``factor`` of an even load; None: all.

        Raises:
            ConfigError: it has no experts.
        """
        if factor is not None and not any(kind.num_experts for kind in self.spec.layers):
            raise ConfigError(
                f"capacity_factor limits experts and {self.spec.name} has none; leave capacity_factor out"
            )
        return self.model_copy(update={"capacity_factor": factor})

    def tp_degrees(self) -> tuple[int, ...]:
        """The tp degrees at which every kind of layer was measured, ascending."""
        return self._tp_degrees

    @cached_property
    def _tp_degrees(self) -> tuple[int, ...]:
        measured = [{sample.tp for sample in self.compute if sample.unit == kind.name} for kind in self.spec.layers]
        return tuple(sorted(set.intersection(*measured)))
