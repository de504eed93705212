"""A tower's seconds and bytes: layers that see the patches of all images of a batch, one after the other.

Takes a model whose embedding has one (``core.model.Tower``).  A text is taken to have one square image for which half
of its tokens stand, or less, as profiles take it.  Tensor-parallel ranks repeat all of it, and nothing of it is
recomputed; frozen it is run forward alone and keeps nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from galvatron.core.model import LayerKind, ModelSpec, ParameterSpec, Precision, Tower, UnitSpec
from galvatron.core.units import DTYPE_BYTES

from .activations import layer_activations
from .compute import BACKWARD, Rates, added_bytes, layer_sample
from .layer import is_gated

COPIES = 4
"""Hidden states that attention copies where images lie one after the other, beside what layers of texts keep; without
a gate the MLP keeps its width once more, for an activation that is written out.
[Empirical: 2026-11, counted on real tensors of Qwen2-VL's and Qwen2.5-VL's towers]"""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a tower sees of a sequence: patches, ``tokens`` that stand for them; its layers by kind, and the rest."""

    patches: int
    tokens: int
    kinds: tuple[LayerKind, ...]
    around: tuple[ParameterSpec, ...]

    @property
    def other_products(self) -> int:
        """Multiplications beside the layers: of patches as they come, and of what tokens stand for."""
        tables = (p for p in self.around if len(p.shape) > 1 and "embedding" not in p.name)
        return sum(math.prod(p.shape) * (self.patches if len(p.shape) == 5 else self.tokens) for p in tables)

    @property
    def is_trained(self) -> bool:
        """Whether anything of it has a gradient."""
        return any(p.trainable for unit in (*self.kinds, UnitSpec(parameters=self.around)) for p in unit.parameters)


def seen_by_tower(spec: ModelSpec, seq_len: int) -> Seen | None:
    """Of a sequence of ``seq_len`` tokens; None where there is no tower, or no room for an image."""
    tower = spec.tower
    if tower is None or not (tokens := tower.image_tokens(seq_len)):
        return None
    every, prefix = spec.embedding.parameters, f"{tower.layers}."
    first = tuple(p for p in every if p.name.startswith(f"{prefix}0."))
    count = len([p for p in every if p.name.startswith(prefix)]) // len(first)
    around = tuple(p for p in every if p.name.startswith(tower.within) and not p.name.startswith(prefix))
    return Seen(tokens * tower.merge**2, tokens, tuple(_kinds(tower, first, count)), around)


def _kinds(tower: Tower, parameters: tuple[ParameterSpec, ...], count: int) -> list[LayerKind]:
    """Layers that see windows, and those that see all of an image."""
    matrices = [p.shape for p in parameters if len(p.shape) == 2]
    hidden = min(shape[0] for shape in matrices if shape[0] == shape[1])
    whole = tower.whole_layers if tower.window else count
    spans = ((count - whole, tower.window), (whole, None))
    return [
        LayerKind(
            name="tower",
            count=number,
            hidden_size=hidden,
            ffn_size=next(out for out, inner in reversed(matrices) if out != hidden or inner == hidden),
            num_heads=tower.num_heads,
            num_kv_heads=tower.num_heads,
            head_dim=hidden // tower.num_heads,
            causal=False,
            attention_span=span,
            parameters=parameters,
        )
        for number, span in spans
        if number
    ]


def tower_seconds(spec: ModelSpec, batch: int, seq_len: int, rates: Rates) -> tuple[float, float]:
    """Forward and backward of ``batch`` sequences' images."""
    seen = seen_by_tower(spec, seq_len)
    if seen is None:
        return 0.0, 0.0
    layers = [
        (kind.count, layer_sample(kind, spec.family, 1, batch, seen.patches, rates, compiled=False))
        for kind in seen.kinds
    ]
    around_s = 2.0 * batch * seen.other_products / rates.flops_per_s
    forward_s = sum(count * sample.forward_s for count, sample in layers) + around_s
    added_s = rates.moved_s(added_bytes(seen.around, 1, rates.element_bytes))
    backward_s = sum(count * sample.backward_s for count, sample in layers) + BACKWARD * around_s + added_s
    return forward_s, backward_s * seen.is_trained


def tower_bytes(spec: ModelSpec, seq_len: int, precision: Precision) -> tuple[float, float]:
    """What the images of one sequence leave behind for the backward, and the most that a layer of it takes besides."""
    seen = seen_by_tower(spec, seq_len)
    if seen is None or not seen.is_trained:
        return 0.0, 0.0
    samples = [
        (kind.count, layer_activations(kind, spec.family, 1, "none", seen.patches, precision, compiled=False))
        for kind in seen.kinds
    ]
    copied = (COPIES * kind.hidden_size + (not is_gated(kind)) * kind.ffn_size for kind in seen.kinds)
    size = seen.patches * DTYPE_BYTES[precision]
    saved = sum(
        count * (sample.bytes_per_sequence + width * size)
        for (count, sample), width in zip(samples, copied, strict=True)
    )
    return saved, max(float(sample.workspace_bytes_per_sequence) for _, sample in samples)
