"""What a model is (ModelSpec) and what its layers cost on a device (ModelProfile, ``model.json``).

A model is three kinds of *unit*: the ``embedding``, a chain of equal ``layer``s, and the ``head`` (final
norm, projection to the vocabulary, cross entropy).  A unit lists its parameters and how tensor
parallelism cuts each: enough to know every byte before launch.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from .errors import GalvatronError, ProfileError
from .records import FileRecord, Record

UnitName = Literal["embedding", "layer", "head"]
UNITS: tuple[UnitName, ...] = ("embedding", "layer", "head")
Precision = Literal["fp32", "bf16"]
Recompute = Literal["none", "selective", "full"]


class Cut(Record):
    """How tensor parallelism slices a parameter: along ``dim``, in ``segments`` equal parts, by blocks.

    Each segment (a fused qkv has three) holds ``blocks`` indivisible blocks (heads, kv heads, ffn or
    vocabulary rows); tp rank r takes its run of blocks from every segment.  When tp does not divide
    ``blocks`` the rule is ``uneven``: ``refuse`` the plan, ``whole`` (every rank keeps the parameter whole
    and uses its part: kv heads fewer than tp), or ``ceil`` (ranks hold ceil(blocks / tp) or fewer: vocabulary).
    """

    dim: int
    blocks: int
    segments: int = 1
    uneven: Literal["refuse", "whole", "ceil"] = "refuse"

    def is_whole(self, tp: int) -> bool:
        """Whether every tp rank keeps the whole parameter."""
        return tp == 1 or (self.uneven == "whole" and self.blocks % tp != 0)

    def ranges(self, size: int, tp: int, tp_rank: int) -> list[tuple[int, int]]:
        """The (start, stop) ranges along ``dim`` of a ``size``-long dim that ``tp_rank`` of ``tp`` holds."""
        if self.is_whole(tp):
            return [(0, size)]
        segment = size // self.segments
        block = segment // self.blocks
        per_rank = math.ceil(self.blocks / tp)
        start = min(tp_rank * per_rank, self.blocks) * block
        stop = min((tp_rank + 1) * per_rank, self.blocks) * block
        return [(i * segment + start, i * segment + stop) for i in range(self.segments)]


class ParameterSpec(Record):
    """One parameter of a unit: its name within the model's unit, full shape and tensor-parallel cut."""

    name: str
    shape: tuple[int, ...]
    cut: Cut | None = None

    def local_shape(self, tp: int, tp_rank: int = 0) -> tuple[int, ...]:
        """The shape that ``tp_rank`` holds; rank 0 holds the largest."""
        if self.cut is None:
            return self.shape
        size = sum(stop - start for start, stop in self.cut.ranges(self.shape[self.cut.dim], tp, tp_rank))
        return (*self.shape[: self.cut.dim], size, *self.shape[self.cut.dim + 1 :])


class UnitSpec(Record):
    """The parameters of one unit, in the order the runtime shards them."""

    parameters: tuple[ParameterSpec, ...]

    @property
    def num_parameters(self) -> int:
        """Elements of the whole unit, uncut."""
        return sum(math.prod(p.shape) for p in self.parameters)


class ModelSpec(Record):
    """A Transformer language model as the search sees it; sizes are elements, lengths are tokens."""

    name: str
    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_seq_len: int
    tied_embeddings: bool
    embedding: UnitSpec
    layer: UnitSpec
    head: UnitSpec

    def unit(self, name: UnitName) -> UnitSpec:
        """The unit called ``name``.  A tied head lists the shared weight too (see ``tied_embeddings``)."""
        unit: UnitSpec = getattr(self, name)
        return unit

    @property
    def num_parameters(self) -> int:
        """Elements of the whole model; a tied weight counts once."""
        total = self.embedding.num_parameters + self.num_layers * self.layer.num_parameters
        tied = self.vocab_size * self.hidden_size if self.tied_embeddings else 0
        return total + self.head.num_parameters - tied

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs a token, forward + backward: 6 × matmul parameters + 12·L·h·s (PaLM, appendix B).

        The input embedding is a lookup and does not count; the output projection does.
        """
        matmul = self.num_layers * self.layer.num_parameters + self.vocab_size * self.hidden_size
        attention = 12 * self.num_layers * self.num_heads * self.head_dim * seq_len
        return 6.0 * matmul + attention


class ComputeSample(Record):
    """Median forward and backward seconds of one unit at a tp-cut shape, without any communication.

    ``batch`` sequences of ``seq_len`` tokens enter as one of ``tp`` ranks holds them, [batch, seq_len/tp, hidden],
    and weights have that rank's shape; the copies that gathering and scattering make locally are included.
    """

    unit: UnitName
    tp: int
    batch: int
    seq_len: int
    forward_s: float
    backward_s: float


class ActivationSample(Record):
    """Bytes that one microbatch leaves behind on a rank of a unit, counted on fake tensors.

    For a local microbatch of b sequences of ``seq_len`` tokens:
    saved bytes = ``fixed_bytes`` + b × ``bytes_per_sequence`` (alive from forward to backward);
    the unit's own forward and backward reach ``workspace_bytes_per_sequence`` × b above what is saved.
    The unit's input (the boundary tensor, cut 1/tp along the sequence) counts where the unit keeps it, its output
    never: it is the next unit's input.  What all layers share (rotary tables) is in the embedding's ``fixed_bytes``.
    """

    unit: UnitName
    tp: int
    recompute: Recompute
    seq_len: int
    fixed_bytes: int
    bytes_per_sequence: int
    workspace_bytes_per_sequence: int


class ModelProfile(FileRecord):
    """``model.json``: a model's shapes with its measured compute and counted activations.

    ``optimizer_s_per_parameter`` is the time of one AdamW step divided by the local elements it updates.
    """

    FORMAT: ClassVar[str] = "galvatron.model"
    ERROR: ClassVar[type[GalvatronError]] = ProfileError

    spec: ModelSpec
    device: str
    precision: Precision
    seq_len: int
    compute: tuple[ComputeSample, ...]
    activations: tuple[ActivationSample, ...]
    optimizer_s_per_parameter: float = 0.0

    def tp_degrees(self) -> tuple[int, ...]:
        """The tp degrees at which layers were measured, ascending."""
        return tuple(sorted({sample.tp for sample in self.compute if sample.unit == "layer"}))
