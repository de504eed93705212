"""What a type of model is made of: Family, by the names of its modules.

A family is found by recognition (``galvatron.models``), proved by gradients (``galvatron.parallelize.proof``) and kept
as data.  It holds for every size: counts are named (``heads``), never given.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, StrictBool

from .model import ParameterSpec
from .numbers import Whole
from .records import Record
from .tasks import Ends, Task

Blocks = Literal["heads", "kv_heads", "kv_head", "ffn"]
"""What the blocks of a cut are: see ``core.model.Cut``; ``kv_head`` is a single one, whatever the config counts."""


class Region(Record):
    """A part of a layer that needs whole sequences: it gathers its input and scatters its output; paths in the layer.

    Attributes:
        entries: modules whose first argument is gathered, but for the usual one: what has all columns and the row.
        columns: linears cut along their output, with the blocks of every segment.
        row: the linear cut along its input, whose output is reduce-scattered.
        wide_norms: norms over the whole width of a column, which need the squares of all ranks, with their blocks.
        by_head: parameters, or modules whose parameters, have an entry a head, with their blocks.
        by_head_dims: in which dim of those parameters, where it is not the first.
        flat: the entries see tokens in one dim, [B x S, H].
        windows: the entries see windows of the layer's tokens, [B x windows, tokens of one, H]: the whole layer needs
            whole sequences, and its rows are summed instead.
        sides: further arguments of the entries that are gathered likewise: states of another stack.
        head_inputs: arguments of the entries that have an entry a head, and in which dim: biases of scores.
    """

    entries: tuple[str, ...] = ()
    columns: dict[str, tuple[Blocks, ...]]
    row: str
    wide_norms: dict[str, Blocks] = Field(default_factory=dict)
    by_head: dict[str, Blocks] = Field(default_factory=dict)
    by_head_dims: dict[str, Whole] = Field(default_factory=dict)
    flat: StrictBool = False
    windows: StrictBool = False
    sides: tuple[str, ...] = ()
    head_inputs: dict[str, int] = Field(default_factory=dict)

    @property
    def gathering(self) -> tuple[str, ...]:
        """The modules whose first argument is gathered."""
        return self.entries or (around((*self.columns, self.row)),)

    @property
    def row_blocks(self) -> Blocks:
        """What the row is cut by."""
        return "ffn" if any("ffn" in blocks for blocks in self.columns.values()) else "heads"


def around(paths: Iterable[str]) -> str:
    """The path of the innermost module that has all of ``paths``."""
    parents = [path.split(".")[:-1] for path in paths]
    alike = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parents, strict=False))
    return ".".join(names[0] for names in alike)


class Experts(Record):
    """Experts of a layer, which dim 0 of their parameters counts; paths in the layer.

    Attributes:
        module: what is called with tokens [T, H], the experts that each is sent to [T, k], and their weights [T, k].
        router: what says which, from tokens: its first output is logits [T, E].
        cuts: of a parameter of the module, the dim that counts units of an expert's width, and in how many segments.
            What has none is a bias of the experts' output, added to their products once.
        beside: what the block around the module gives what it is given itself, after it has asked the experts: shared
            ones; None where there is none, or it comes first.
    """

    module: str
    router: str
    cuts: dict[str, tuple[int, int]]
    beside: str | None = None


class Stack(Record):
    """A list of layers that hand their hidden states on: its path, and the regions that its layers have.

    ``regions``: in the order of the forward pass; () where tensor parallelism was not proved.  A layer has those whose
    modules it has, and ``experts`` likewise: what an MLP is made of where every token takes a few of many.
    ``outputs``: how many a layer returns in a tuple, hidden states first; 0 for these alone.
    ``causal``: whether a token attends to those before it alone.  ``side``: the argument by which layers are given
    what another stack ends with.  ``biased``: whether the first layer makes a bias of all layers' attention scores.
    ``needs_output``: whether a backward needs what a layer's last region comes to: a norm or a factor follows it.
    ``recorded``: whether what follows takes states from between its layers, which then all end with whole sequences.
    ``taken_at``: the key of the config that says after how many of its layers its states are taken, from its end where
    that is negative (-1: after all); the layers behind do not run.
    ``joined``: of the family's ``before``, what runs on the way from the stack before to this one.  ``pooled``: the
    module whose output is all that is taken of this stack, where the next one takes nothing of it (towers).
    """

    path: str
    regions: tuple[Region, ...] = ()
    experts: Experts | None = None
    outputs: Whole = 0
    causal: StrictBool = True
    side: str | None = None
    biased: StrictBool = False
    needs_output: StrictBool = False
    recorded: StrictBool = False
    taken_at: str | None = None
    joined: tuple[str, ...] = ()
    pooled: str | None = None

    def idle_layers(self, taken_at: object, layers: int) -> int:
        """How many of its ``layers`` nothing takes anything of, by what its config says."""
        if self.taken_at is None or not isinstance(taken_at, (int, float)):
            return 0
        return min(max(int(-1 - taken_at if taken_at < 0 else layers - taken_at), 0), layers)

    @property
    def windowed(self) -> bool:
        """Whether its layers need whole sequences, of which they see windows."""
        return any(region.windows for region in self.regions)


def beside_experts(stack: Stack, parameters: Iterable[ParameterSpec]) -> str | None:
    """What layers of these ``parameters`` run beside the messages to their experts; None where they have none."""
    experts = stack.experts
    return experts.beside if experts is not None and any(p.experts for p in parameters) else None


class Logits(Record):
    """What is done to the head's output: scaled, then capped; by keys of the configuration."""

    scale_by: str | None = None
    divide_by: str | None = None
    soft_cap: str | None = None


class Outline(Record):
    """Where a type keeps its units, but for its stacks; paths in the model.

    Embedding and head see tokens (``ends``) where both treat every token by itself, as most decoders' do: then each
    rank has its part of every sequence there too.  Otherwise they see whole sequences.

    Attributes:
        task: what the model is trained for.
        embedding: the table of the vocabulary; None where there is none.
        before: what has parameters and runs before the layers: positions, norms, patches.  Of ends that see whole
            sequences it holds the embedding too.
        norm: of ends that see tokens, what runs between the layers and the head.
        after: of ends that see whole sequences, what has parameters and runs after the layers, but the head.
        bare: parameters after the layers that no module but one around the layers has, by name.
        unused: parameters that the output for this task does not depend on, of no module that runs, by name.
        head: the projection to the vocabulary; None where the model's own output is what the loss takes.
        asks_for_attention: whether tokens see each other through the attention alone that layers are told to call; if
            not, ends see whole sequences, and layers take masks as tensors.
        needless_masks: whether that attention is given masks that say what causality says already.
        tower: of ``before``, what sees a batch's images as patches one after the other, which no cut of sequences or
            samples fits: it runs as it is, with the embedding (``models.grids``).
    """

    model_type: str
    task: Task = "causal_lm"
    ends: Ends = "tokens"
    embedding: str | None = None
    before: tuple[str, ...] = ()
    norm: str | None = None
    after: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    head: str | None = None
    logits: Logits = Logits()
    asks_for_attention: StrictBool = True
    needless_masks: StrictBool = False
    tower: str | None = None

    @property
    def loose(self) -> tuple[str, ...]:
        """Parameters that no module around the layers runs with."""
        return (*self.bare, *self.unused)


class Family(Outline):
    """Where a type keeps its units: ``stacks`` in the order of the forward pass, and what is around them."""

    stacks: tuple[Stack, ...] = Field(min_length=1)

    @property
    def decoder(self) -> str:
        """Of ends that see tokens, the module that runs the layers when it is given ``inputs_embeds``."""
        return self.stacks[0].path.rpartition(".")[0] if self.ends == "tokens" else ""

    @property
    def is_cuttable(self) -> bool:
        """Whether it is known how tensor parallelism cuts all its layers."""
        return all(stack.regions for stack in self.stacks)


WINDOWS = ("sliding_window", "local_attention")
"""Keys of configs that say how far a token sees."""
BEYOND_RINGS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_logit_softcapping")
"""Keys of configs under which attention needs all scores of a query at once: dropout of its weights, capped scores."""
DROPS = (
    *("hidden_dropout_prob", "hidden_dropout", "resid_pdrop", "residual_dropout", "resid_dropout", "dropout"),
    *("dropout_rate", "drop_path_rate"),
)
"""Keys of configs for dropout of what regions come to, or of whole regions: which of them a backward has to know."""
