"""Families as data: what is known of a type for every size, without its code; files of ``core/families``.

A file says nothing twice: how parameters are cut follows from the family (``core.cuts``), what is usual is left out,
and parameters that are alike share a line.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import ClassVar

from pydantic import Field, StrictBool

from .compact import compact
from .family import Family, Outline, Stack
from .numbers import Whole
from .records import FileRecord, Record
from .tasks import Task

FOLDER = Path(__file__).parent / "families"
USUAL_SIZES = {"vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings"}
"""Of a model."""
USUAL_LAYERS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}
"""Of a stack's layers."""
USUAL_EXPERTS = {"num_experts": "num_experts", "experts_per_token": "num_experts_per_tok"}
"""Further ones, where some have experts."""
USUAL_DEFAULTS = {"num_key_value_heads": "num_attention_heads", "head_dim": "hidden_size/num_attention_heads"}
"""Of the configuration, or of one within it."""


class Shape(Record):
    """Parameters that follow each other and are alike, by formulas (``core.formulas``); they exist under ``when``.

    Attributes:
        names: the parameters'; or, with a ``bias``, those of modules with a weight of this shape.
        bias: whether these modules have one, as long as their outputs, or under which flag.
        transposed: the weight is [inputs, outputs].
        words: dim 0 counts words, which are dealt out as they come.
        shared: see ``ParameterSpec``; ``trainable`` too.
        each: how many modules in a row have these, and those of the lines beside that say the same; ``*`` counts them.
        stack: of an embedding's, on the way to which stack it is; ``again``: on the way to which it is looked up too.
        after: how many layers, the first ones of the stack, lack it; a formula of numbers that may be 0.
        until: how many alone have it, if not 0.
    """

    names: tuple[str, ...] = Field(min_length=1)
    shape: tuple[str, ...]
    bias: bool | str = False
    transposed: StrictBool = False
    words: StrictBool = False
    shared: StrictBool = False
    trainable: StrictBool = True
    each: str = ""
    stack: Whole = 0
    again: tuple[Whole, ...] = ()
    after: str = "0"
    until: str = "0"
    when: dict[str, bool] = Field(default_factory=dict)


class KnownStack(Stack):
    """A stack with its ``sizes``, those of ``LayerKind`` (``dense_ffn_size``: without experts), and its layers."""

    sizes: dict[str, str] = Field(default_factory=dict)
    layer: tuple[Shape, ...] = ()

    @property
    def formulas(self) -> dict[str, str]:
        """Of all sizes, the usual ones too."""
        return usual_sizes(self) | self.sizes

    @property
    def stack(self) -> Stack:
        """The stack alone."""
        return Stack(**{name: getattr(self, name) for name in Stack.model_fields})


def usual_sizes(stack: Stack) -> dict[str, str]:
    """The formulas of sizes that files leave out."""
    return USUAL_LAYERS if stack.experts is None else USUAL_LAYERS | USUAL_EXPERTS


class KnownFamily(FileRecord):
    """A family as data: recognised, proved, and described for every size without its code.

    One whose sizes are lists has no shapes: no formula says them.

    Attributes:
        transformers: the version it was proved with.
        proved: the structures (``models.structure_key``) whose gradients were proved, in words.
        names: what the config file calls a size, where that is another name; ``part.size`` is in a config within it.
        defaults: what the type takes for a key that a file leaves out: a number, a list, a flag, a formula, or
            ``key^begins``, a flag that is set where the word of another key begins so.
        fixed: values under which the shapes hold.
        sizes: ``vocab_size`` and ``max_seq_len`` of ``ModelSpec``.
    """

    FORMAT: ClassVar[str] = "galvatron.family"
    VERSION: ClassVar[int] = 2

    transformers: str
    proved: dict[str, str]
    outline: Outline
    names: dict[str, str] = Field(default_factory=dict)
    defaults: dict[str, bool | int | float | str | list[int]] = Field(default_factory=dict)
    fixed: dict[str, bool | int | str | list[int]] = Field(default_factory=dict)
    sizes: dict[str, str] = Field(default_factory=dict)
    embedding: tuple[Shape, ...] = ()
    stacks: tuple[KnownStack, ...] = Field(min_length=1)
    head: tuple[Shape, ...] = ()

    @property
    def family(self) -> Family:
        """What the runtime knows of it."""
        return Family(**dict(self.outline), stacks=tuple(known.stack for known in self.stacks))

    @property
    def has_shapes(self) -> bool:
        """Whether its parameters are described too."""
        return bool(self.head)

    def to_json(self) -> str:
        """The file's text, in lines of a page."""
        body = self.model_dump(mode="json", exclude_defaults=True)
        return compact({"format": self.FORMAT, "version": self.VERSION, **body})


@cache
def known_families() -> dict[str, KnownFamily]:
    """The families that ship, by type; those of another task than the type's usual one by ``type.task``."""
    return {path.stem: KnownFamily.load(path) for path in sorted(FOLDER.glob("*.json"))}


def known_family(model_type: str, task: Task | None = None) -> KnownFamily | None:
    """The one that ships for a type's usual ``task``, or for another; None where there is none."""
    usual = known_families().get(model_type)
    if usual is None or task in (None, usual.family.task):
        return usual
    return known_families().get(f"{model_type}.{task}")
