"""What is fixed while strategies vary: the profiles, the pipeline and the batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self, TypeVar

import numpy as np

from galvatron.core.errors import ProfileError
from galvatron.core.hardware import HardwareProfile, Link, Op
from galvatron.core.model import ENDS, LayerKind, ParameterSpec, Precision, ReduceDtype, UnitName
from galvatron.core.model_profile import ActivationSample, ComputeSample, ModelProfile
from galvatron.core.units import DTYPE_BYTES
from galvatron.plan.plan import Plan, Schedule
from galvatron.plan.schedules import turns_at_once

from .strategies import Floats, Ints

Seconds = TypeVar("Seconds", float, Floats)
Runtime = Literal["galvatron", "hetu"]
"""Who runs the plan.  Hetu-Galvatron has FSDP for every strategy, keeps whole gradients until the last microbatch (its
``async_grad_reduce``) and holds tied weights twice."""


@dataclass(frozen=True)
class Setting:
    """One pipeline and one number of microbatches of one job on one cluster.

    Raises ProfileError when the model profile was measured at another sequence length or precision.
    """

    model: ModelProfile
    hardware: HardwareProfile
    pp: int
    num_microbatches: int
    global_batch_size: int
    seq_len: int
    precision: Precision
    grad_reduce_dtype: ReduceDtype
    schedule: Schedule = "1f1b"
    model_chunks: int = 1
    runtime: Runtime = "galvatron"

    def __post_init__(self) -> None:
        for name, wanted, measured in (
            ("seq_len", self.seq_len, self.model.seq_len),
            ("precision", self.precision, self.model.precision),
        ):
            if wanted != measured:
                raise ProfileError(
                    f"the model profile was measured at {name}={measured} but the job has {name}={wanted}; "
                    f"profile the model at {name}={wanted}"
                )

    @classmethod
    def of(cls, plan: Plan, model: ModelProfile, hardware: HardwareProfile, runtime: Runtime = "galvatron") -> Self:
        """The setting of a whole plan."""
        return cls(
            model,
            hardware,
            plan.pp,
            plan.num_microbatches,
            plan.global_batch_size,
            plan.seq_len,
            plan.precision,
            plan.grad_reduce_dtype,
            plan.schedule,
            plan.model_chunks,
            runtime,
        )

    @property
    def stage_size(self) -> int:
        """Devices per stage."""
        return self.hardware.world_size // self.pp

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one microbatch, over all data-parallel ranks."""
        return self.global_batch_size // self.num_microbatches

    @property
    def compute_bytes(self) -> int:
        """Bytes of one element in the compute dtype."""
        return DTYPE_BYTES[self.precision]

    @property
    def reduce_bytes(self) -> int:
        """Bytes of one gradient element while it is reduced."""
        return DTYPE_BYTES[self.grad_reduce_dtype]

    def tokens(self, unit: UnitName) -> int:
        """Tokens of one sequence in ``unit``."""
        return self._kind(unit).tokens(self.seq_len)

    def cut_tokens(self, unit: UnitName, degree: Ints) -> Ints:
        """The same with what fills patches up to a multiple of ``degree``, which cuts them (``plan.filling``)."""
        tokens = self.tokens(unit)
        return -(-tokens // degree) * degree if self.fills(unit) else np.full_like(degree, tokens)

    def fills(self, unit: UnitName) -> bool:
        """Whether sequences in ``unit`` are of patches, and these are not as many as the stage can cut."""
        patches = self.model.spec.patches(self._kind(unit), self.seq_len)
        return patches % self.stage_size > 0

    def hidden_size(self, unit: UnitName) -> int:
        """Hidden size of ``unit``."""
        return self._kind(unit).hidden_size

    def _kind(self, unit: UnitName) -> LayerKind:
        """The kind of layer called ``unit``, or next to that end."""
        spec = self.model.spec
        return spec.layers[0 if unit == "embedding" else -1] if unit in ENDS else spec.kind(unit)

    def side_kind(self, unit: UnitName) -> LayerKind | None:
        """The kind of layers whose states those of ``unit`` attend to beside their own, if any."""
        spec = self.model.spec
        return spec.layers[0] if unit not in ENDS and spec.kind(unit).sees_side else None

    def side_bytes(self, unit: UnitName) -> int:
        """Bytes of what a rank has of these states, of one microbatch: 1 / n of all; 0 where there are none."""
        side = self.side_kind(unit)
        return 0 if side is None else self.hidden_bytes(side.name)

    def hidden_bytes(self, unit: UnitName) -> int:
        """Bytes of one microbatch's hidden states that a rank holds as they enter ``unit``: 1 / n of all.

        Of patches as many as the most ways to cut them, as many as there are heads, fill up.
        """
        elements = self._most_tokens(unit) * self.hidden_size(unit)
        return self.micro_batch_size * elements * self.compute_bytes // self.stage_size

    def entering_bytes(self, unit: UnitName, degree: int | None = None) -> int:
        """The same with what rides along; ``degree``: by how many patches are cut, if it is known."""
        if unit in ENDS:
            return self.hidden_bytes(unit)
        tokens = self._most_tokens(unit) if degree is None else int(self.cut_tokens(unit, np.array(degree)))
        elements = self.model.spec.kind(unit).entering_elements(tokens)
        return self.micro_batch_size * elements * self.compute_bytes // self.stage_size

    def _most_tokens(self, unit: UnitName) -> int:
        most = np.array(min(self.stage_size, self._kind(unit).num_heads))
        return int(self.cut_tokens(unit, most))

    def entering_tensors(self, unit: UnitName) -> int:
        """In how many tensors they are."""
        return 1 if unit in ENDS else self.model.spec.kind(unit).entering_tensors

    @property
    def fill(self) -> float:
        """Which part of a microbatch's work every other stage adds to the step while the pipeline fills and drains.

        1F1B and GPipe: all of it; v model chunks: 1 / v (Narayanan et al. 2021, 2.2).  Zero bubble, with forward,
        backward and weight pass taken as equal: the first two without the weight passes that fill the bubble (what a
        unit's own times say beyond that is in ``UnitTimes.work_s``), of a chunk.
        """
        if self.schedule == "zero_bubble":
            return (2 - self.weights_in_bubble) / (3 * self.model_chunks)
        return 1 / self.model_chunks

    @property
    def weights_in_bubble(self) -> float:
        """Weight passes that a zero-bubble schedule has for each other stage's bubble: 1 from m v = pp on."""
        return min(1.0, (self.num_microbatches * self.model_chunks - 1) / (self.pp - 1)) if self.pp > 1 else 1.0

    @property
    def slots(self) -> float:
        """How many times one stage's microbatch a pipeline of equal stages takes."""
        return self.num_microbatches + self.fill * (self.pp - 1)

    @property
    def whole_fill(self) -> float:
        """What a second counts that no schedule shortens when it fills, in the currency of ``UnitTimes.work_s``.

        1 but for the zero bubble, whose fill leaves out weight gradients alone.
        """
        fill = 1 / self.model_chunks
        return (self.num_microbatches + fill * (self.pp - 1)) / self.slots

    def gathers_twice(self, unit: UnitName, layers: range | None = None) -> bool:
        """Whether ZeRO 3 gathers parameters for the backward of ``unit`` too.

        A table's backward needs no value of it; a head's begins where its forward ends, if the schedule says so.
        """
        if unit not in ENDS:
            return True
        if unit == "embedding" and not self.shares_tied_weight:
            return any(len(parameter.shape) != 2 for parameter in self.parameters(unit, layers))
        holds_head = unit == "head" or self.shares_tied_weight
        return holds_head and not turns_at_once(self.schedule, self.num_microbatches)

    def arriving_last(self, unit: UnitName) -> tuple[ParameterSpec, ...]:
        """Parameters of ``unit`` whose gradients come whole with the last backward, not with every one.

        The projection's where all forwards, which make it, come before; tied, the embedding's part comes with each.
        """
        turns = turns_at_once(self.schedule, self.num_microbatches)
        return () if turns or unit != "head" or self.shares_tied_weight else self.parameters(unit)[-1:]

    def combined_s(self, total_s: Seconds, largest_s: Seconds) -> Seconds:
        """A step from Σ w and max w of its stages' microbatches: max(s·(φ·Σ w + (m - φ)·max w), m·Σ w / pp).

        The first is the longest path through the pipeline, φ its ``fill``; s, the device's ``full_speed_fraction``,
        is 1 where every rank has a device of its own.  Ranks that share cores run 1/s times faster while others
        wait, but all their work together takes the second, which a path at full speed never undercuts where s is 1.
        """
        m, fraction, fill = self.num_microbatches, self.hardware.device.full_speed_fraction, self.fill
        path_s = fill * total_s + (m - fill) * largest_s
        combined: Seconds = np.maximum(fraction * path_s, m * total_s / self.pp)
        return combined

    def received_s(self, transfer_s: float) -> float:
        """What a message that every microbatch brings a stage adds to its work (see ``UnitTimes.work_s``).

        Where messages travel beside compute, interleaving has enough microbatches in flight to hide all but those
        of the fill.
        """
        hidden = self.model_chunks > 1 and self.overlaps
        return transfer_s * (self.pp / self.slots if hidden else self.whole_fill)

    @property
    def host_bytes_per_s(self) -> float:
        """Rate of copies from host memory and back; raises ProfileError where it was not measured."""
        rate = self.hardware.device.host_bytes_per_s
        if rate is None:
            raise ProfileError(
                "the hardware profile has no rate of copies to host memory (host_bytes_per_s), which "
                "offload=optimizer needs; profile the hardware anew"
            )
        return rate

    @property
    def overlaps(self) -> bool:
        """Whether FSDP2's communication runs beside compute: it has streams of its own on CUDA alone."""
        return self.hardware.device.type == "cuda"

    @property
    def shares_tied_weight(self) -> bool:
        """Whether embedding and head are one tensor on the same ranks, one FSDP group."""
        return self.model.spec.tied_embeddings and self.pp == 1 and self.runtime == "galvatron"

    @property
    def reduces_once(self) -> bool:
        """Whether gradients are reduced after the last microbatch alone, whatever the ZeRO stage."""
        return self.runtime == "hetu"

    @property
    def copies_tied_weight(self) -> bool:
        """Whether the first and the last stage each hold a copy of the tied weight."""
        return self.model.spec.tied_embeddings and self.pp > 1

    def link(self, op: Op, size: int, stride: int) -> Link:
        """The measured link of that shape; raises ProfileError where there is none."""
        return self.hardware.link(op, size, stride)

    def links(self, op: Op, size: Ints, stride: Ints) -> tuple[Floats, Floats]:
        """(latency_s, seconds_per_byte) of every shape; zeros for groups of one.  Raises ProfileError as ``link``."""
        table = self.hardware.link_table(op)
        latency_s, seconds_per_byte = table.find(size, stride)
        for row in np.flatnonzero(np.isnan(latency_s))[:1]:
            sizes, strides = (np.broadcast_to(column, latency_s.shape).flat for column in (size, stride))
            self.link(op, int(sizes[row]), int(strides[row]))
        return latency_s, seconds_per_byte

    @cached_property
    def _compute(self) -> dict[tuple[UnitName, int], tuple[ComputeSample, ...]]:
        groups: dict[tuple[UnitName, int], list[ComputeSample]] = {}
        for sample in sorted(self.model.compute, key=lambda sample: sample.batch):
            if sample.seq_len == self.seq_len:
                groups.setdefault((sample.unit, sample.tp), []).append(sample)
        return {key: tuple(samples) for key, samples in groups.items()}

    def compute_samples(self, unit: UnitName, tp: int) -> tuple[ComputeSample, ...]:
        """Samples of one unit at one tp degree, by batch; raises ProfileError where there are none."""
        samples = self._compute.get((unit, tp))
        if samples is None:
            measured = sorted(degree for name, degree in self._compute if name == unit)
            raise ProfileError(
                f"the model profile has no compute time of the {unit} at tp={tp}, seq_len={self.seq_len}; "
                f"measured tp: {measured}; profile the model with tp={tp}"
            )
        return samples

    @cached_property
    def _activations(self) -> dict[tuple[UnitName, int, str], ActivationSample]:
        samples = [sample for sample in self.model.activations if sample.seq_len == self.seq_len]
        return {(sample.unit, sample.tp, sample.recompute): sample for sample in samples}

    def activation_sample(
        self, unit: UnitName, tp: int, recompute: str, layers: range | None = None
    ) -> ActivationSample:
        """The saved bytes of one unit; raises ProfileError where they were not counted.

        Of a pipeline's embedding those of what a stage with ``layers`` has of it (None: what runs before the first);
        all of it where its parts were not told apart.
        """
        sample = self._activations.get((unit, tp, recompute))
        if sample is None:
            raise ProfileError(
                f"the model profile has no activation bytes of the {unit} at tp={tp}, recompute={recompute}, "
                f"seq_len={self.seq_len}; profile the model with tp={tp}"
            )
        if unit != "embedding" or self.pp == 1 or not sample.joints:
            return sample
        joints = list(zip(self.model.spec.joints, sample.joints, strict=True))
        here = [kept for joint, kept in joints if joint.layer - 1 in (layers or ())]
        if layers is None or layers.start == 0:
            fixed, per_sequence = (sum(column) for column in zip(*sample.joints, strict=True))
            here.append((sample.fixed_bytes - fixed, sample.bytes_per_sequence - per_sequence))
        kept = {"fixed_bytes": sum(fixed for fixed, _ in here), "bytes_per_sequence": sum(each for _, each in here)}
        return sample.model_copy(update=kept)

    def fixed_bytes(self, unit: UnitName) -> int:
        """What one microbatch of any size leaves behind in ``unit``."""
        return self.activation_sample(unit, self.model.tp_degrees()[0], "none").fixed_bytes

    def has_activations(self, unit: UnitName, tp: int, recompute: str) -> bool:
        """Whether the profile counted that unit, cut and recomputed like this."""
        return (unit, tp, recompute) in self._activations

    def parameters(self, unit: UnitName, layers: range | None = None) -> tuple[ParameterSpec, ...]:
        """The parameters that a unit holds itself; a head that shares the embedding's weight leaves it out.

        Of a pipeline's embedding those that a stage with ``layers`` has (None: what runs before the first), but for a
        table that the head has too.
        """
        spec, parameters = self.model.spec, self.model.spec.unit(unit).parameters
        if unit == "embedding" and self.pp > 1 and spec.joints:
            within = spec.embedding_within(layers or range(0))
            is_tied = spec.tied_embeddings and layers is not None and layers.stop == spec.num_layers
            return tuple(p for p in within if not is_tied or p.name != spec.embedding.parameters[0].name)
        if unit == "head" and self.shares_tied_weight:
            return tuple(p for p in parameters if p.shape != (spec.vocab_size, spec.hidden_size))
        return tuple(p for p in parameters if p not in spec.numbers) if unit == "head" else parameters
