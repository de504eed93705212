"""What a model is: ModelSpec.

A model is a chain of *units*: the ``embedding``, layers of one or more *kinds* (a T5's encoder and decoder, a
DeepSeek's dense and MoE layers), and the ``head`` (final norm, projection to the vocabulary, cross entropy).  A unit
lists its parameters and how tensor and expert parallelism cut each: enough to know every byte before launch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, StrictBool, model_validator

from .errors import ConfigError
from .numbers import Count, Layers, Tokens, Whole
from .records import Record
from .tasks import TOKEN_TASKS, Ends, Task

UnitName = str
"""``embedding``, ``head`` or the name of a kind of layer (``layer`` where all are equal)."""
ENDS: tuple[UnitName, UnitName] = ("embedding", "head")
Origin = Literal["measured", "imported", "estimated"]
Precision = Literal["fp32", "bf16", "fp16"]
"""What is computed in; parameters and optimizer states are always fp32."""
ReduceDtype = Literal["fp32", "bf16"]
"""What gradients are summed in; fp16 would overflow."""
Recompute = Literal["none", "selective", "mlp", "linears", "full"]
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)
"""What a layer's backward pass runs again: every level all that the one before it does, and more, to keep less.

``selective``: all but linears and attention; ``mlp``: linears of the MLP too; ``linears``: all but attention.
"""

Offload = Literal["none", "optimizer"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
"""What of a unit is in host memory between updates: nothing, or AdamW's moments."""


class Cut(Record):
    """How tensor parallelism slices a parameter: along ``dim``, in segments one after the other, by equal blocks.

    ``segments``: how many indivisible blocks (heads, kv heads, ffn or vocabulary rows) each segment holds: ``(8,)`` of
    a plain matrix, ``(8, 8, 8)`` of a fused query, key and value, ``(8, 2, 2)`` where kv heads are fewer.  tp rank r
    takes its run of blocks from every segment.  When tp does not divide them all the rule is ``uneven``: ``refuse``
    the plan, ``whole`` (every rank keeps the parameter whole and uses its part: kv heads fewer than tp), or ``ceil``
    (ranks hold ceil(blocks / tp) or fewer: vocabulary).
    """

    dim: Annotated[int, Field(strict=True, ge=0, le=7)]
    segments: tuple[Count, ...] = Field(min_length=1, max_length=8)
    uneven: Literal["refuse", "whole", "ceil"] = "refuse"

    @property
    def blocks(self) -> int:
        """What tp must divide to divide every segment."""
        return math.gcd(*self.segments)

    def is_whole(self, tp: int) -> bool:
        """Whether every tp rank keeps the whole parameter."""
        return tp == 1 or (self.uneven == "whole" and self.blocks % tp != 0)

    def leaves_ranks_empty(self, tp: int) -> bool:
        """Whether the first ranks take so many blocks that the last has none."""
        return self.uneven == "ceil" and (tp - 1) * math.ceil(self.blocks / tp) >= self.blocks

    def ranges(self, size: int, tp: int, tp_rank: int) -> list[tuple[int, int]]:
        """The (start, stop) ranges along ``dim`` of a ``size``-long dim that ``tp_rank`` of ``tp`` holds."""
        if self.is_whole(tp):
            return [(0, size)]
        block, before, found = size // sum(self.segments), 0, []
        for blocks in self.segments:
            start, stop = (before + min(rank * math.ceil(blocks / tp), blocks) for rank in (tp_rank, tp_rank + 1))
            found.append((start * block, stop * block))
            before += blocks
        return found


class ParameterSpec(Record):
    """One parameter of a unit: its name within the model's unit, full shape ([] of a number) and tensor-parallel cut.

    ``experts``: dim 0 counts experts, which expert parallelism deals out; every expert is cut by tp alike.
    ``shared``: later layers of the stack use it too, so that every stage of theirs has a copy, whole on every rank.
    ``trainable``: whether it has a gradient and optimizer states; a frozen one is held and gathered alone.
    """

    name: str
    shape: tuple[Count, ...] = Field(max_length=8)
    cut: Cut | None = None
    experts: StrictBool = False
    shared: StrictBool = False
    trainable: StrictBool = True

    @model_validator(mode="after")
    def _blocks_tile_the_dim(self) -> Self:
        if self.experts and len(self.shape) not in (2, 3):
            raise ValueError(f"{self.name} of experts must have 2 or 3 dims, got shape {list(self.shape)}")
        cut = self.cut
        if cut is not None and (cut.dim >= len(self.shape) or self.shape[cut.dim] % sum(cut.segments)):
            raise ValueError(
                f"{self.name} of shape {list(self.shape)} cannot be cut along dim {cut.dim} into segments of "
                f"{list(cut.segments)} equal blocks"
            )
        return self

    @property
    def num_elements(self) -> int:
        """Of the whole parameter."""
        return math.prod(self.shape)

    def local_shape(self, tp: int, tp_rank: int = 0, ep: int = 1) -> tuple[int, ...]:
        """The shape that ``tp_rank`` of any of ``ep`` expert ranks holds; tp rank 0 holds the largest."""
        shape = (self.shape[0] // ep, *self.shape[1:]) if self.experts else self.shape
        if self.cut is None:
            return shape
        size = sum(stop - start for start, stop in self.cut.ranges(shape[self.cut.dim], tp, tp_rank))
        return (*shape[: self.cut.dim], size, *shape[self.cut.dim + 1 :])


def shard_dim(shape: tuple[int, ...], num_shards: int) -> int:
    """The dim of a tensor that ZeRO shards: 0, as FSDP2 does; where experts do not divide, one of theirs that does.

    FSDP2 shards no other dim than 0 unevenly.
    """
    if len(shape) != 3 or shape[0] % num_shards == 0:
        return 0
    return next((dim for dim in (1, 2) if shape[dim] % num_shards == 0), 0)


class UnitSpec(Record):
    """The parameters of one unit, in the order the runtime shards them."""

    parameters: tuple[ParameterSpec, ...]

    @property
    def num_parameters(self) -> int:
        """Elements of the whole unit, uncut."""
        return sum(math.prod(p.shape) for p in self.parameters)

    @property
    def trained_share(self) -> float:
        """Which part of its elements is trainable."""
        return sum(math.prod(p.shape) for p in self.parameters if p.trainable) / max(self.num_parameters, 1)


class LayerKind(UnitSpec):
    """``count`` equal layers that follow each other; sizes are elements, of one layer.

    ``tokens_divisor``: a sequence of the job has seq_len / this many tokens here (a Swin stage merges patches), or
    ``fixed_tokens`` whatever its length, if that is not 0 (a vision tower's patches).
    ``side_inputs``: further hidden states of equal size that ride along from layer to layer (a decoder's encoder
    output); ``carried``: further elements of a sample that do, whatever its length.
    ``regions``: submodules that gather the sequence and scatter it again under tensor parallelism.
    ``attention_span``: tokens that one token attends to at most (a window); None for the whole sequence.
    ``windowed``: whether windows are of a grid (``core.family.Region``): tensor-parallel ranks gather whole sequences
    around the layer, and what its regions come to.
    ``drops_attention``: whether dropout falls on what attention weighs, its scores are capped, or a window looks both
    ways: no ring can do these.
    ``asks_for_attention``: whether tokens see each other through an attention that is given to layers alone; layers
    with their own need whole sequences.  ``cuttable``: whether it is known how tensor parallelism cuts them.
    ``beside_experts``: the module that every token takes while it travels to experts on other ranks, if any.
    """

    name: UnitName = "layer"
    count: Layers
    hidden_size: Count
    ffn_size: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    tokens_divisor: Count = 1
    fixed_tokens: Whole = 0
    side_inputs: Whole = 0
    carried: Whole = 0
    regions: Count = 2
    causal: StrictBool = True
    attention_span: Count | None = None
    windowed: StrictBool = False
    drops_attention: StrictBool = False
    asks_for_attention: StrictBool = True
    cuttable: StrictBool = True
    num_experts: Whole = 0
    experts_per_token: Whole = 0
    beside_experts: str | None = None

    @model_validator(mode="after")
    def _heads_and_experts_divide(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads} of {self.name}")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must not exceed num_experts={self.num_experts}"
            )
        return self

    def tokens(self, seq_len: int) -> int:
        """Tokens of one sequence in these layers."""
        return self.fixed_tokens or seq_len // self.tokens_divisor

    def entering_elements(self, tokens: int) -> int:
        """Elements of a sequence of ``tokens`` here that enter a layer: hidden states, and those that ride along."""
        return tokens * self.hidden_size * (1 + self.side_inputs) + self.carried

    @property
    def entering_tensors(self) -> int:
        """In how many tensors these elements are."""
        return 1 + self.side_inputs + bool(self.carried)

    @property
    def active_parameters(self) -> float:
        """Elements that one token meets: of the experts, the ``experts_per_token`` it is sent to."""
        experts = sum(math.prod(p.shape) for p in self.parameters if p.experts)
        share = self.experts_per_token / self.num_experts if self.num_experts else 1.0
        return self.num_parameters - experts + share * experts

    @property
    def share_beside_experts(self) -> float:
        """Which part of ``active_parameters`` is met while tokens travel to their experts."""
        if self.beside_experts is None:
            return 0.0
        beside = (math.prod(p.shape) for p in self.parameters if p.name.startswith(f"{self.beside_experts}."))
        return sum(beside) / self.active_parameters

    def attention_flops_per_token(self, seq_len: int) -> float:
        """Forward FLOPs of scores and values for one token, as if nothing were masked: 4 x heads x head_dim x span."""
        span = min(self.tokens(seq_len), self.attention_span or self.tokens(seq_len))
        return 4.0 * self.num_heads * self.head_dim * span


class Joint(Record):
    """The way from one stack to the next: what makes hidden states for ``layer``, the first of the next one.

    It is with the layer before.  ``parameters``: those of the embedding that are nowhere else, by name; ``table``:
    whether the vocabulary's, the embedding's first, is looked up here too.
    """

    layer: Count
    parameters: tuple[str, ...] = ()
    table: StrictBool = False


class ModelSpec(Record):
    """A Transformer as the search sees it: embedding, layers by kind in the order of the forward pass, head.

    ``task``: what it is trained for; where that gives whole samples classes these are the vocabulary.  ``ends``: see
    ``core.family.Family``.  ``stacks``: lists of layers that the model runs one after the other, and the ``joints``
    between them, which are part of the embedding.
    """

    name: str
    family: str
    task: Task = "causal_lm"
    ends: Ends = "tokens"
    stacks: Count = 1
    joints: tuple[Joint, ...] = ()
    layers: tuple[LayerKind, ...] = Field(min_length=1)
    vocab_size: Count
    max_seq_len: Tokens
    tied_embeddings: StrictBool
    embedding: UnitSpec
    head: UnitSpec

    @model_validator(mode="after")
    def _kinds_have_names_of_their_own(self) -> Self:
        names = [*ENDS, *(kind.name for kind in self.layers)]
        if len(set(names)) != len(names):
            raise ValueError(f"units need different names, got {', '.join(names)}; rename a kind of layer")
        return self

    def sequence_problem(self, seq_len: int) -> str | None:
        """Why sequences of ``seq_len`` tokens cannot pass, as a sentence; None if they can."""
        if not 1 <= seq_len <= self.max_seq_len:
            return (
                f"seq_len={seq_len} must be from 1 to max_seq_len={self.max_seq_len} of {self.name}; "
                "choose one of these"
            )
        if self.task == "image_classification" and seq_len != self.max_seq_len:
            return f"seq_len={seq_len} must be {self.max_seq_len}, what an image is to {self.name}; choose that"
        merged = math.lcm(*(kind.tokens_divisor for kind in self.layers))
        if seq_len % merged:
            whole = max(seq_len // merged, 1) * merged
            return f"seq_len={seq_len} must be a multiple of {merged}, as {self.name} merges tokens; choose {whole}"
        return None

    def patches(self, kind: LayerKind, seq_len: int) -> int:
        """Tokens of one sequence in layers of ``kind`` where they are patches of an image; 0 where they are not.

        Nobody chooses how many there are, so they are filled up where they are cut.
        """
        is_image = self.task == "image_classification" or (kind.fixed_tokens and self.task != "speech_to_text")
        return kind.tokens(seq_len) if is_image else 0

    @property
    def ends_alike(self) -> bool:
        """Whether embedding and head need equal cuts: they share a weight, or the head looks at inputs and samples."""
        return self.tied_embeddings or self.task not in TOKEN_TASKS

    @property
    def tied_names(self) -> tuple[str, str] | None:
        """What embedding and head call a weight that they share; None where they call it alike, or share none."""
        names = self.embedding.parameters[0].name, self.head.parameters[-1].name
        return names if self.tied_embeddings and names[0] != names[1] else None

    @property
    def units(self) -> tuple[UnitName, ...]:
        """The names of all units: embedding, kinds of layers, head."""
        return ENDS[0], *(kind.name for kind in self.layers), ENDS[1]

    @property
    def num_layers(self) -> int:
        """Layers of all kinds."""
        return sum(kind.count for kind in self.layers)

    @property
    def layer(self) -> LayerKind:
        """The kind that all layers are of.

        Raises:
            ConfigError: there are several kinds.
        """
        if len(self.layers) > 1:
            kinds = ", ".join(kind.name for kind in self.layers)
            raise ConfigError(f"model {self.name} has several kinds of layers ({kinds}); this takes models of one kind")
        return self.layers[0]

    @property
    def hidden_size(self) -> int:
        """Hidden size of the first layers."""
        return self.layers[0].hidden_size

    def unit(self, name: UnitName) -> UnitSpec:
        """The unit called ``name``.  A tied head lists the shared weight too (see ``tied_embeddings``)."""
        if name in ENDS:
            unit: UnitSpec = getattr(self, name)
            return unit
        return self.kind(name)

    def kind(self, name: UnitName) -> LayerKind:
        """The kind of layer called ``name``; KeyError if there is none."""
        for kind in self.layers:
            if kind.name == name:
                return kind
        raise KeyError(name)

    def kind_of_layers(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, first to last."""
        return tuple(kind for kind in self.layers for _ in range(kind.count))

    def is_reached(self, unit: UnitName) -> bool:
        """Whether the backward pass reaches ``unit``: whether it or a unit before it has a trainable parameter."""
        if unit not in ENDS:
            kinds = [kind.name for kind in self.kind_of_layers()]
            return self.is_layer_reached(kinds.index(unit))
        upto = self.units[: self.units.index(unit) + 1]
        return any(p.trainable for name in upto for p in self.unit(name).parameters)

    def is_layer_reached(self, layer: int) -> bool:
        """The same of layer ``layer`` (0-based)."""
        own = self.kind_of_layers()[layer].parameters
        return any(p.trainable for p in own) or self.trains_before(layer)

    def trains_before(self, layer: int) -> bool:
        """Whether a gradient goes on from layer ``layer`` (0-based) to what comes before it, to be used there."""
        later = {name for joint in self.joints if joint.layer > layer for name in joint.parameters}
        ends = (p for p in self.embedding.parameters if p.name not in later)
        layers = (p for kind in self.kind_of_layers()[:layer] for p in kind.parameters)
        return any(p.trainable for p in (*ends, *layers))

    @property
    def stack_ranges(self) -> tuple[range, ...]:
        """The layers of every stack, where they are joined."""
        starts = [0, *(joint.layer for joint in self.joints), self.num_layers]
        return tuple(itertools.starmap(range, itertools.pairwise(starts)))

    def embedding_within(self, layers: range) -> tuple[ParameterSpec, ...]:
        """What of the embedding a stage with ``layers`` has: the beginning goes with layer 0, joints as they say."""
        joined = {name for joint in self.joints for name in joint.parameters}
        here = [joint for joint in self.joints if joint.layer - 1 in layers]
        own = {name for joint in here for name in joint.parameters}
        if any(joint.table for joint in here):
            own.add(self.embedding.parameters[0].name)
        parameters = self.embedding.parameters
        return tuple(p for p in parameters if p.name in own or (layers.start == 0 and p.name not in joined))

    def trained_parameters(self) -> Iterator[ParameterSpec]:
        """What has a gradient, once a unit: parameters of a kind of layer have their names within one."""
        return (parameter for unit in self.units for parameter in self.unit(unit).parameters if parameter.trainable)

    @property
    def num_parameters(self) -> int:
        """Elements of the whole model; a tied weight counts once."""
        total = self.embedding.num_parameters + sum(kind.count * kind.num_parameters for kind in self.layers)
        tied = self.vocab_size * self.hidden_size if self.tied_embeddings else 0
        return total + self.head.num_parameters - tied

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs a token, forward + backward: 6 × active matmul parameters + 12·L·h·s (PaLM, appendix B).

        The input embedding is a lookup and does not count; the output projection does.  Kinds whose sequences are
        shorter count by their share of tokens.  Of the 6, 2 are the forward, 2 the gradient of the input, which units
        before the first trainable one do not need, and 2 the gradient of the weight, for what is trainable.
        """
        projects = all(p.trainable for p in self.head.parameters[-1:])
        reached = 2.0 * self.is_reached(self.layers[-1].name)
        total = (2.0 + reached + 2.0 * projects) * self.vocab_size * self.layers[-1].hidden_size
        for kind in self.layers:
            reached = 2.0 * self.is_reached(kind.name)
            matmuls = (2.0 + reached + 2.0 * kind.trained_share) * kind.active_parameters
            layer = matmuls + (1.0 + reached) * kind.attention_flops_per_token(seq_len)
            total += kind.count * layer * kind.tokens(seq_len) / seq_len
        return total
