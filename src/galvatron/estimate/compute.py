"""Seconds of a unit's forward and backward on one device: a roofline over its matrices, attention and what is moved.

Takes a model's shapes and a device's rates; gives ComputeSamples.  Every term is the larger of arithmetic and memory
traffic (Williams et al. 2009); large products lose to their shape; below a number of operators a layer is bound by
the host that launches them.  Communication is left out.

[Empirical: 2026-11, ``benchmarks/published_runs.py``: of vTrain's 1,440 published runs of GPT on one node of A100 the
predicted over the measured step time is 1.02 in the median, off by 9% in the mean; of its 109 runs on up to 512 A100 it
is 0.92 and 13%, without flash attention there.]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from galvatron.core.errors import ConfigError
from galvatron.core.hardware import Device
from galvatron.core.model import LayerKind, ModelSpec, Precision, Recompute, UnitName
from galvatron.core.model_profile import ComputeSample
from galvatron.core.units import DTYPE_BYTES

from .activations import FLOAT, TOKEN_ID, head_tokens
from .devices import Preset, find_preset
from .layer import LocalLayer, local_layer, matrices, uses_rms

HALF_EFFICIENT = 64
"""Rows, columns or depth at which a product reaches half of its best rate along that dim.  [Assumed: half of the
128-wide tiles that cuBLAS and CUTLASS use]"""
ATTENTION_SHARE = 0.7
"""Flash attention's rate over that of large products.  [Assumed: FlashAttention-2 (Dao 2023, section 4) reaches 160
to 190 of 312 TFLOP/s forward on A100, large products some 250]"""
ATTENTION_BACKWARD = 2.5
"""Backward over forward FLOPs of flash attention: five products for two (Dao 2023, section 4.1)."""
BACKWARD = 2.0
"""Backward over forward of linears (gradients of input and of weight) and of what is moved."""
DISPATCH_S = 25e-6
"""The host's time for one operator in forward, hooks of modules and of data parallelism included.
[Empirical: 2026-11, T5-3B at one sequence of 512 in Hetu-Galvatron's A100 profiles: 1.29 ms a layer of the encoder,
2.33 of the decoder; a slow host, which hides all but small layers]"""
BACKWARD_DISPATCH = 1.5
"""The host's time in backward over forward.  [Empirical: 2026-11, smallest of vTrain's A100 runs, which take some
3.7 ms a layer and microbatch with full recompute]"""
OPERATORS = {"embedding": 8, "head": 30, "region": 18, "window": 40}
"""Operators of the ends, of a region beside its linears, and of a layer's windows.  [Assumed: counted on Hugging
Face's LLaMA and Swin]"""
ADAMW_BYTES = 7 * FLOAT
"""AdamW reads parameter, gradient and two moments, writes all but the gradient: float32 (fused kernel)."""
FLOPS_PER_BYTE = {"cuda": 200.0, "cpu": 10.0}
"""Best matrix rate over memory bandwidth of a device without a preset.  [Assumed: presets have 130 to 370, server CPUs
some 5 to 20]"""
ROTARY_MOVED = 10  # elements moved for each of q and k: two products 4, half turned 3, sum 3
RESIDUAL_MOVED = 3  # two read, one written
COPY_MOVED = 2  # one read, one written
WINDOW_COPIES = 4  # of hidden states: shifted, cut into windows, and both undone


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device reaches: FLOPs and bytes a second."""

    flops_per_s: float
    bytes_per_s: float
    element_bytes: int

    @classmethod
    def of(cls, device: Preset | Device, precision: Precision) -> Rates:
        """The rates of ``device`` in ``precision``: of a measured one its own matrix rate, and its preset's memory.

        Raises:
            ConfigError: matrix products were not measured in that precision.
        """
        if isinstance(device, Preset):
            return cls(device.matmul_flops_per_s(precision), device.achieved_memory_bytes_per_s, DTYPE_BYTES[precision])
        rates, found = device.matmul_flops_per_s, find_preset(device.name)
        if precision not in rates:
            raise ConfigError(
                f"{device.name} has no matrix rate in {precision} to estimate by; choose --precision "
                f"{' or '.join(rates) or 'of a device that has one'}, or profile the model"
            )
        balanced = max(rates.values()) / FLOPS_PER_BYTE[device.type]
        moved = found.achieved_memory_bytes_per_s if found else balanced
        return cls(rates[precision], moved, DTYPE_BYTES[precision])

    def matmul_s(self, count: int, rows: float, inner: int, outer: int) -> float:
        """``count`` products of [rows, inner] and [inner, outer]: arithmetic at its shape's rate, or traffic."""
        flops = 2.0 * count * rows * inner * outer
        moved = count * (rows * inner + inner * outer + rows * outer) * self.element_bytes
        shape = math.prod(size / (size + HALF_EFFICIENT) for size in (rows, inner, outer))
        return max(flops / (self.flops_per_s * shape), moved / self.bytes_per_s)

    def moved_s(self, num_bytes: float) -> float:
        """Seconds to read and write ``num_bytes`` in all."""
        return num_bytes / self.bytes_per_s


def layer_sample(kind: LayerKind, family: str, tp: int, batch: int, seq_len: int, rates: Rates) -> ComputeSample:
    """One layer of ``batch`` sequences on one of ``tp`` ranks."""
    layer = local_layer(kind, family, tp, seq_len)
    matmul_s = _matmuls_s(layer.matrices, batch * layer.tokens, rates)
    attention_s = batch * layer.attentions * _attention_s(layer, rates)
    again_s = batch * rates.moved_s(_moved_again_bytes(layer, rates.element_bytes))
    other_s = batch * rates.moved_s(_moved_once_bytes(layer, rates.element_bytes))
    operators = len(layer.matrices) + OPERATORS["region"] * layer.regions + OPERATORS["window"] * layer.windowed
    forward_s = matmul_s + attention_s + again_s + other_s
    backward_s = BACKWARD * (matmul_s + again_s + other_s) + ATTENTION_BACKWARD * attention_s
    widths = ((1, layer.ffn, 1.0), (layer.experts, layer.routed_ffn, layer.routed / max(layer.experts, 1)))
    mlp = tuple((count, layer.hidden, width, share) for count, width, share in widths if count * width)
    one_s = _matmuls_s(mlp, batch * layer.tokens, rates)  # of the MLP's products: up, gate or down
    levels: dict[Recompute, float] = {
        "selective": again_s,
        "mlp": again_s + layer.kept_ups * one_s,
        "linears": again_s + matmul_s - one_s,  # the last is not needed again
    }
    return _sample(kind.name, tp, batch, seq_len, forward_s, backward_s, operators, levels)


def _matmuls_s(shapes: tuple[tuple[int, int, int, float], ...], tokens: float, rates: Rates) -> float:
    return sum(rates.matmul_s(count, tokens * share, inner, outer) for count, outer, inner, share in shapes)


def _attention_s(layer: LocalLayer, rates: Rates) -> float:
    """Scores and values of one sequence: half of them where all later tokens are masked."""
    flops = 4.0 * layer.tokens * layer.span * layer.query * (1 - layer.masked_share)
    moved = 2 * layer.tokens * (layer.query + layer.key_value) * rates.element_bytes
    return max(flops / (rates.flops_per_s * ATTENTION_SHARE), rates.moved_s(moved))


def _moved_again_bytes(layer: LocalLayer, size: int) -> float:
    """What selective recompute repeats: norms, rotary positions, activations."""
    norms = layer.regions * layer.chunk * layer.hidden * _norm_moved_bytes(layer.rms, size)
    inner = layer.tokens * layer.inner * _norm_moved_bytes(True, size)
    rotary = layer.rotary * ROTARY_MOVED * layer.tokens * (layer.query + layer.key_value) * size
    width = layer.ffn + layer.routed * layer.routed_ffn
    return norms + layer.attentions * (inner + rotary) + layer.moved * layer.tokens * width * size


def _norm_moved_bytes(rms: bool, size: int) -> int:
    """Bytes of each element: a LayerNorm is one kernel; an RMS norm squares, averages and scales in float32."""
    if not rms:
        return COPY_MOVED * size
    casts = 0 if size == FLOAT else 2 * (size + FLOAT)
    return casts + 5 * FLOAT + COPY_MOVED * size


def _moved_once_bytes(layer: LocalLayer, size: int) -> float:
    """Residual sums, attention's output made contiguous, copies that gathers, scatters, experts and windows make."""
    residuals = layer.regions * RESIDUAL_MOVED * layer.chunk * layer.hidden
    outputs = layer.attentions * COPY_MOVED * layer.tokens * layer.query
    copies = layer.regions * 2 * COPY_MOVED * layer.tokens * layer.hidden if layer.tp > 1 else 0
    routed = 2 * RESIDUAL_MOVED * layer.routed * layer.tokens * layer.hidden
    windows = layer.windowed * WINDOW_COPIES * COPY_MOVED * layer.tokens * layer.hidden
    return size * (residuals + outputs + copies + routed + windows)


def embedding_sample(spec: ModelSpec, tp: int, batch: int, seq_len: int, rates: Rates) -> ComputeSample:
    """A lookup, or patches projected; cut vocabularies mask what is not theirs.  Backward adds into a new gradient."""
    size, elements = rates.element_bytes, batch * seq_len * spec.hidden_size
    passes = COPY_MOVED if tp == 1 else COPY_MOVED + 3 * COPY_MOVED
    gradient = sum(math.prod(p.local_shape(tp)) for p in spec.embedding.parameters) * size
    patches = sum(math.prod(p.shape) for p in spec.embedding.parameters if len(p.shape) == 4)
    project_s = 2.0 * patches * batch * seq_len / rates.flops_per_s
    forward_s = rates.moved_s(passes * elements * size + batch * seq_len * TOKEN_ID) + project_s
    backward_s = rates.moved_s((passes + RESIDUAL_MOVED) * elements * size + gradient) + project_s
    return _sample("embedding", tp, batch, seq_len, forward_s, backward_s, OPERATORS["embedding"])


def head_sample(spec: ModelSpec, tp: int, batch: int, seq_len: int, rates: Rates) -> ComputeSample:
    """Norm, projection, cross entropy in float32 (maximum, shift, exponential, sum, gradient) and both products of its
    backward, all in the forward pass but for the norm's backward."""
    size, hidden = rates.element_bytes, spec.layers[-1].hidden_size
    tokens = batch * head_tokens(spec, seq_len)
    normed = batch * spec.layers[-1].tokens(seq_len) / tp * hidden
    logits = tokens * math.ceil(spec.vocab_size / tp)
    matmul_s = _matmuls_s(matrices(spec.head.parameters, tp), tokens, rates)
    norm_s = rates.moved_s(normed * _norm_moved_bytes(uses_rms(spec.head), size))
    forward_s = (1 + BACKWARD) * matmul_s + norm_s + rates.moved_s(logits * (5 * size + 9 * FLOAT))
    backward_s = BACKWARD * norm_s
    return _sample("head", tp, batch, seq_len, forward_s, backward_s, OPERATORS["head"])


def _sample(
    unit: UnitName,
    tp: int,
    batch: int,
    seq_len: int,
    forward_s: float,
    backward_s: float,
    operators: int,
    again_s: dict[Recompute, float] | None = None,
) -> ComputeSample:
    return ComputeSample(
        unit=unit,
        tp=tp,
        batch=batch,
        seq_len=seq_len,
        forward_s=max(forward_s, DISPATCH_S * operators),
        backward_s=max(backward_s, BACKWARD_DISPATCH * DISPATCH_S * operators),
        again_s=again_s or {},
    )
