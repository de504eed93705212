"""ModelSpec: embedding, layers by kind in the order of the forward pass, head."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Self

from pydantic import Field, StrictBool, model_validator

from ..errors import ConfigError
from ..numbers import Count, Tokens
from ..records import Record
from ..tasks import TOKEN_TASKS, Ends, Task
from .parameters import ParameterSpec
from .tower import Tower
from .units import LayerKind, UnitSpec
from .words import ENDS, UnitName


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
    between them, which are part of the embedding.  ``tower``: what of the embedding sees images of any size.
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
    tower: Tower | None = None

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
    def numbers(self) -> tuple[ParameterSpec, ...]:
        """What a contrast has beside all layers, on every rank: a scale, perhaps a bias; they are the head's."""
        return tuple(p for p in self.head.parameters if p.num_elements == 1) if self.task == "contrast" else ()

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

    def is_idle(self, unit: UnitName) -> bool:
        """Whether ``unit`` is layers that are held alone."""
        return unit not in ENDS and self.kind(unit).idle

    def taken(self, joint: Joint) -> int:
        """The layer whose states go on at ``joint``: the last one before it that runs."""
        kinds = self.kind_of_layers()
        return next((index for index in reversed(range(joint.layer)) if not kinds[index].idle), joint.layer - 1)

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
        for kind in (kind for kind in self.layers if not kind.idle):
            reached = 2.0 * self.is_reached(kind.name)
            matmuls = (2.0 + reached + 2.0 * kind.trained_share) * kind.active_parameters
            layer = matmuls + (1.0 + reached) * kind.attention_flops_per_token(seq_len)
            total += kind.count * layer * kind.tokens(seq_len) / seq_len
        return total
