"""What is fixed while strategies vary: the profiles, the pipeline degree and the batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from galvatron.core.errors import ProfileError
from galvatron.core.hardware import HardwareProfile, Link, Op
from galvatron.core.model import ActivationSample, ComputeSample, ModelProfile, ParameterSpec, Precision, UnitName
from galvatron.core.units import DTYPE_BYTES
from galvatron.plan.plan import Plan

Seconds = TypeVar("Seconds", float, NDArray[np.float64])


@dataclass(frozen=True)
class Setting:
    """One pipeline degree and one number of microbatches of one job on one cluster.

    Raises ProfileError when the model profile was measured at another sequence length or precision.
    """

    model: ModelProfile
    hardware: HardwareProfile
    pp: int
    num_microbatches: int
    global_batch_size: int
    seq_len: int
    precision: Precision
    grad_reduce_dtype: Precision

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
    def of(cls, plan: Plan, model: ModelProfile, hardware: HardwareProfile) -> Self:
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

    @property
    def boundary_bytes(self) -> int:
        """Bytes of the hidden states of one microbatch that a rank holds between layers: 1 / n of all."""
        elements = self.micro_batch_size * self.seq_len * self.model.spec.hidden_size
        return elements * self.compute_bytes // self.stage_size

    def combined_s(self, total_s: Seconds, largest_s: Seconds) -> Seconds:
        """A step from Σ w and max w of its stages' microbatches: max(s·(Σ w + (m - 1)·max w), m·Σ w / pp).

        The first is the longest path through the pipeline; s, the device's ``full_speed_fraction``, is 1 where
        every rank has a device of its own.  Ranks that share cores run 1/s times faster while others wait, but
        all their work together takes the second, which a path at full speed never undercuts where s is 1.
        """
        m, fraction = self.num_microbatches, self.hardware.device.full_speed_fraction
        combined: Seconds = np.maximum(fraction * (total_s + (m - 1) * largest_s), m * total_s / self.pp)
        return combined

    @property
    def overlaps(self) -> bool:
        """Whether FSDP2's communication runs beside compute: it has streams of its own on CUDA alone."""
        return self.hardware.device.type == "cuda"

    @property
    def shares_tied_weight(self) -> bool:
        """Whether embedding and head are one tensor on the same ranks, one FSDP group."""
        return self.model.spec.tied_embeddings and self.pp == 1

    @property
    def copies_tied_weight(self) -> bool:
        """Whether the first and the last stage each hold a copy of the tied weight."""
        return self.model.spec.tied_embeddings and self.pp > 1

    @cached_property
    def _links(self) -> dict[tuple[Op, int, int], Link]:
        return {(link.op, link.size, link.stride): link for link in self.hardware.links}

    def link(self, op: Op, size: int, stride: int) -> Link:
        """The measured link of that shape; raises ProfileError where there is none."""
        found = self._links.get((op, size, stride))
        return found if found is not None else self.hardware.link(op, size, stride)

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

    def activation_sample(self, unit: UnitName, tp: int, recompute: str) -> ActivationSample:
        """The saved bytes of one unit; raises ProfileError where they were not counted."""
        sample = self._activations.get((unit, tp, recompute))
        if sample is None:
            raise ProfileError(
                f"the model profile has no activation bytes of the {unit} at tp={tp}, recompute={recompute}, "
                f"seq_len={self.seq_len}; profile the model with tp={tp}"
            )
        return sample

    @cached_property
    def _parameters(self) -> dict[UnitName, tuple[ParameterSpec, ...]]:
        spec = self.model.spec
        shared = (spec.vocab_size, spec.hidden_size) if self.shares_tied_weight else None
        return {
            "embedding": spec.embedding.parameters,
            "layer": spec.layer.parameters,
            "head": tuple(p for p in spec.head.parameters if p.shape != shared),
        }

    def parameters(self, unit: UnitName) -> tuple[ParameterSpec, ...]:
        """The parameters that a unit holds itself; a head that shares the embedding's weight leaves it out."""
        return self._parameters[unit]
