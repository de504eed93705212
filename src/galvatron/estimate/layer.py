"""What one tensor-parallel rank holds of a kind of layer: widths in elements a token, weights, its family's habits.

Takes a LayerKind and a degree; gives a LocalLayer, from which seconds and bytes follow.  A region (attention, MLP)
works on all tokens of a sequence with this rank's widths; between regions a rank has 1 / tp of the tokens with the
whole width (Korthikanti et al. 2022).  Knows nothing of devices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from galvatron.core.model import LayerKind, ParameterSpec, UnitSpec

# Elements that autograd keeps for every element of the MLP's width: gate, up, activation, product; the Python GELU
# of GPT-2 keeps its input, the tanh, both factors and the product; a fused activation its input and output, and so do
# compiled ones, for the compiler fuses whatever lies between two products.
KEPT_GATED, KEPT_GELU_NEW, KEPT_PLAIN = 4, 5, 2
KEPT_GATED_COMPILED = 3
# Elements read and written for every one in forward: activation 2, product 3; GPT-2's eight operations; activation.
MOVED_GATED, MOVED_GELU_NEW, MOVED_PLAIN = 5, 18, 2
MOVED_GATED_COMPILED = 3
WITHOUT_ROTARY = frozenset({"gpt2", "opt", "bloom", "t5", "bart", "swin", "vit", "deit", "dinov2"}) | {
    *("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "clip", "siglip"),
    *("whisper", "marian", "pegasus"),
}


@dataclass(frozen=True, slots=True)
class LocalLayer:
    """One rank's part of one layer.

    Elements a token: ``hidden`` between regions; ``query``, ``key_value`` (keys alone, or values alone) and ``ffn``
    of this rank; ``inner``, the normed queries and keys or latents inside attention.  ``routed``: copies of a token
    that ``experts`` take, ``routed_ffn`` their width.  ``kept_ups``: of the MLP's kept elements, how many come out of
    linears.  ``needs_output``: a norm or dropout follows what the last region comes to.  ``gathers_all``: whole
    sequences are gathered around the layer.  ``compiled``: what lies between products is fused.
    """

    tokens: int
    tp: int
    hidden: int
    regions: int
    query: int
    key_value: int
    heads: int
    inner: int
    ffn: int
    experts: int
    routed: int
    routed_ffn: int
    kept: int
    kept_ups: int
    moved: int
    rotary: bool
    rms: bool
    span: int
    windowed: bool
    gathers_all: bool
    needs_output: bool
    masked_share: float
    compiled: bool
    matrices: tuple[tuple[int, int, int, float], ...]

    @property
    def chunk(self) -> int:
        """Tokens between regions, patches with what fills them up."""
        return self.tokens if self.gathers_all else math.ceil(self.tokens / self.tp)

    @property
    def attentions(self) -> int:
        """Regions that are attention; the last is the MLP."""
        return self.regions - 1

    @property
    def head_dim(self) -> int:
        """Elements of one head's query."""
        return self.query // self.heads


def local_layer(kind: LayerKind, family: str, tp: int, seq_len: int, *, compiled: bool) -> LocalLayer:
    """The part of tp rank 0, which holds the most."""
    tokens, names = kind.tokens(seq_len), [p.name for p in kind.parameters]
    gated = is_gated(kind)
    kept, moved = _activation(family, gated, compiled)
    span = min(tokens, kind.attention_span or tokens)
    ffn = kind.ffn_size // tp
    return LocalLayer(
        tokens=tokens,
        tp=tp,
        hidden=kind.hidden_size,
        regions=kind.regions,
        query=kind.num_heads * kind.head_dim // tp,
        key_value=max(kind.num_kv_heads // tp, 1) * kind.head_dim,
        heads=kind.num_heads // tp,
        inner=_inner_norms(kind, tp),
        ffn=_shared_ffn(kind, tp) if kind.num_experts else ffn,
        experts=kind.num_experts,
        routed=kind.experts_per_token,
        routed_ffn=ffn if kind.num_experts else 0,
        kept=kept,
        kept_ups=2 if gated else 1,
        moved=moved,
        rotary=family not in WITHOUT_ROTARY and not kind.fixed_tokens,  # as towers beside texts have none
        rms=not any(re.search(r"(norm|ln_\d).*bias$", name.lower()) for name in names),
        span=span,
        windowed=kind.attention_span is not None,
        gathers_all=kind.windowed,
        needs_output=kind.needs_output,
        masked_share=0.5 if kind.causal and span == tokens else 0.0,
        compiled=compiled,
        matrices=matrices(kind.parameters, tp, kind.experts_per_token),
    )


def is_gated(kind: LayerKind) -> bool:
    """Whether its MLP multiplies two projections."""
    return any(re.search(r"gate_proj|gate_up_proj|wi_0", p.name) for p in kind.parameters)


def matrices(
    parameters: Iterable[ParameterSpec], tp: int, experts_per_token: int = 0
) -> tuple[tuple[int, int, int, float], ...]:
    """(how many, one side, other side, rows a token for each) of every weight that multiplies tokens.

    Experts share the tokens evenly, each token ``experts_per_token`` times; tables that are looked up are left out.
    """
    found = []
    for parameter in parameters:
        shape = parameter.local_shape(tp)
        if parameter.experts:
            found += [(*shape, experts_per_token / shape[0])] if len(shape) == 3 else []  # experts may have biases
        elif len(shape) == 2 and "bias" not in parameter.name:
            found.append((1, shape[0], shape[1], 1.0))
    return tuple(found)


def uses_rms(unit: UnitSpec) -> bool:
    """Whether the unit's norms have no bias: written out in float32, where a LayerNorm is one kernel."""
    return not any(re.search(r"(norm|ln_).*bias$", p.name.lower()) for p in unit.parameters)


def _activation(family: str, gated: bool, compiled: bool) -> tuple[int, int]:
    if gated:
        return (KEPT_GATED_COMPILED, MOVED_GATED_COMPILED) if compiled else (KEPT_GATED, MOVED_GATED)
    return (KEPT_GELU_NEW, MOVED_GELU_NEW) if family == "gpt2" and not compiled else (KEPT_PLAIN, MOVED_PLAIN)


def _inner_norms(kind: LayerKind, tp: int) -> int:
    """Elements a token that norms within attention see: this rank's queries and keys, or whole latents."""
    sizes = {p.name.rpartition(".")[0].rpartition(".")[2]: math.prod(p.shape) for p in kind.parameters}
    latents = sum(sizes.get(name, 0) for name in ("q_a_layernorm", "kv_a_layernorm"))
    heads = kind.num_heads // tp + max(kind.num_kv_heads // tp, 1)
    return latents + (heads * kind.head_dim if "q_norm" in sizes else 0)


def _shared_ffn(kind: LayerKind, tp: int) -> int:
    """Width of the MLP that every token takes beside its experts."""
    return sum(p.local_shape(tp)[0] for p in kind.parameters if p.name == "mlp.shared_experts.up_proj.weight")
