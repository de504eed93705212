"""UnitSpec and LayerKind: the parameters of a unit, and what else is known of layers that are equal."""

from __future__ import annotations

import math
from typing import Self

from pydantic import StrictBool, model_validator

from ..numbers import Count, Layers, Whole
from ..records import Record
from .parameters import ParameterSpec
from .words import UnitName


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

    ``fixed_tokens``: what a sequence has here, whatever its length (a vision tower's patches); 0 where it has its own.
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
    ``needs_output``: whether a backward needs what the last region comes to (a norm, a factor or dropout follows it):
    recompute keeps it or makes it again.
    ``idle``: whether nothing takes what they come to: they are held, and never run or trained.
    ``beside_experts``: the module that every token takes while it travels to experts on other ranks, if any.
    """

    name: UnitName = "layer"
    count: Layers
    hidden_size: Count
    ffn_size: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
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
    needs_output: StrictBool = False
    idle: StrictBool = False
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
        return self.fixed_tokens or seq_len

    def entering_elements(self, tokens: int) -> int:
        """Elements of a sequence of ``tokens`` here that enter a layer: hidden states, and those that ride along."""
        return tokens * self.hidden_size * (1 + self.side_inputs) + self.carried

    def window_tokens(self, seq_len: int) -> int:
        """Tokens of one sequence where a square grid is filled up to whole windows; of other grids those it has."""
        tokens = self.tokens(seq_len)
        side, window = math.isqrt(tokens), math.isqrt(self.attention_span or tokens)
        return tokens if side * side < tokens else (-(-side // window) * window) ** 2

    @property
    def gathering_regions(self) -> int:
        """Regions but experts, each with one linear that is cut along its input: beside experts that of shared ones."""
        if not self.num_experts:
            return self.regions
        rows = (p for p in self.parameters if not p.experts and len(p.shape) == 2 and ".lora_" not in p.name)
        return sum(p.cut is not None and p.cut.dim == 1 for p in rows)

    @property
    def wide_norms(self) -> int:
        """Norms over the width of all heads, whose squares tensor-parallel ranks sum."""
        return sum(len(p.shape) == 1 and p.cut is not None and p.name.endswith("norm.weight") for p in self.parameters)

    @property
    def sees_side(self) -> bool:
        """Whether layers attend to another stack's states too, in a region of their own."""
        return self.side_inputs > 0 or (self.carried > 0 and self.regions > 2)

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
    def share_of_experts(self) -> float:
        """Which part of ``active_parameters`` is of experts."""
        experts = sum(p.num_elements for p in self.parameters if p.experts)
        return self.experts_per_token / self.num_experts * experts / self.active_parameters if experts else 0.0

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
