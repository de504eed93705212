"""Seconds of a unit's forward and backward on one device: a roofline over its matrices, attention and what is moved.

Takes a model's shapes and a device's rates; gives ComputeSamples.  Every term is the larger of arithmetic and memory
traffic (Williams et al. 2009); large products lose to their shape; below a number of operators a layer is bound by
the host that launches them.  Communication is left out.

[Empirical: 2026-11, ``benchmarks/published_runs.py``: of vTrain's 1,440 published runs of GPT on one node of A100 the
predicted over the measured step time is 0.97 in the median, off by 7.0% in the mean; of its 109 runs on up to 512 A100
it is 0.97 and 7.5%, where the benchmark says what their engine did otherwise.]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from galvatron.core.errors import ConfigError
from galvatron.core.hardware import Device
from galvatron.core.model import LayerKind, ModelSpec, ParameterSpec, Precision, Recompute, UnitName
from galvatron.core.model_profile import ComputeSample
from galvatron.core.units import DTYPE_BYTES

from .activations import FLOAT, TOKEN_ID, beside_tower, chunk_tokens, head_cut, head_rows, head_tokens, stack_tokens
from .devices import Preset, find_preset
from .layer import LocalLayer, local_layer, matrices, uses_rms

HALF_EFFICIENT = 64
"""Rows, columns or depth at which a product reaches half of its best rate along that dim.  [Assumed: half of the
128-wide tiles that cuBLAS and CUTLASS use]"""
ATTENTION_BACKWARD = 2.5
"""Backward over forward FLOPs of flash attention: five products for two (Dao 2023, section 4.1)."""
BACKWARD_EXPONENTIALS = 4.0
"""How many exponentials the rest of attention's backward takes for one score: the exponential again, differences and
products of single scores, conversions and sums of gradients.  [Empirical: 2026-11, head size 64, causal, 4,096 tokens:
342 TFLOP/s on H200 (cuDNN) give 3.7; about 150 on A100 (FlashAttention-2's figure 6) give 4]"""
BACKWARD = 2.0
"""Backward over forward of linears (gradients of input and of weight) and of what is moved."""
DISPATCH_S = 25e-6
"""The host's time for one operator in forward, hooks of modules and of data parallelism included.
[Empirical: 2026-11, T5-3B at one sequence of 512 in Hetu-Galvatron's A100 profiles: 1.29 ms a layer of the encoder,
2.33 of the decoder; a slow host, which hides all but small layers]"""
BACKWARD_DISPATCH = 1.1
"""The host's time in backward over forward.  [Empirical: 2026-11, smallest of vTrain's A100 runs: 24 layers take longer
than 12 by 3.07 ms a layer and microbatch: under full recompute two forwards of 40 operators and a backward]"""
OPERATORS = {"embedding": 18, "head": 50, "region": 18, "window": 40}
"""Operators of the ends, of a region beside its linears, and of a layer's windows.  [Counted on Hugging Face's LLaMA,
views left out; assumed for windows]"""
COMPILED_OPERATORS = {"region": 4, "window": 8}
"""The same where kernels are fused: a norm with the sum before it, an activation or rotary positions, attention.
[Empirical: 2026-11, a LLaMA layer too small to compute, one CPU core: compiled it took 0.28 ms forward, 0.35 backward;
eagerly 1.3 and 2.4]"""
ADAMW_BYTES = 8 * FLOAT
"""AdamW reads parameter, gradient and two moments and writes them, the gradient clipped: float32 (fused kernel)."""
NORM_BYTES = FLOAT
"""The gradient's norm reads it."""
FLOPS_PER_BYTE = {"cuda": 200.0, "cpu": 10.0}
"""Best matrix rate over memory bandwidth of a device without a preset.  [Assumed: presets have 130 to 370, server CPUs
some 5 to 20]"""
FLOPS_PER_EXPONENTIAL = {"cuda": 150.0, "cpu": 50.0}
"""Best matrix rate over exponentials a second of a device without a preset.  [Assumed: presets have 60 to 240]"""
ROTARY_MOVED = 10  # elements moved for each of q and k: two products 4, half turned 3, sum 3
RESIDUAL_MOVED = 3  # two read, one written
COPY_MOVED = 2  # one read, one written
WINDOW_COPIES = 4  # of hidden states: shifted, cut into windows, and both undone


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device reaches: FLOPs and bytes a second."""

    flops_per_s: float
    bytes_per_s: float
    exponentials_per_s: float
    element_bytes: int

    @classmethod
    def of(cls, device: Preset | Device, precision: Precision) -> Rates:
        """The rates of ``device`` in ``precision``: of a measured one its own matrix rate, and its preset's memory.

        Raises:
            ConfigError: matrix products were not measured in that precision.
        """
        if isinstance(device, Preset):
            return cls(
                device.matmul_flops_per_s(precision),
                device.achieved_memory_bytes_per_s,
                device.exponentials_per_s.value,
                DTYPE_BYTES[precision],
            )
        rates, found = device.matmul_flops_per_s, find_preset(device.name)
        if precision not in rates:
            raise ConfigError(
                f"{device.name} has no matrix rate in {precision} to estimate by; choose --precision "
                f"{' or '.join(rates) or 'of a device that has one'}, or profile the model"
            )
        best = max(rates.values())
        moved = found.achieved_memory_bytes_per_s if found else best / FLOPS_PER_BYTE[device.type]
        exponentials = found.exponentials_per_s.value if found else best / FLOPS_PER_EXPONENTIAL[device.type]
        return cls(rates[precision], moved, exponentials, DTYPE_BYTES[precision])

    def matmul_s(self, count: int, rows: float, inner: int, outer: int) -> float:
        """``count`` products of [rows, inner] and [inner, outer]: arithmetic at its shape's rate, or traffic."""
        flops = 2.0 * count * rows * inner * outer
        moved = count * (rows * inner + inner * outer + rows * outer) * self.element_bytes
        shape = math.prod(size / (size + HALF_EFFICIENT) for size in (rows, inner, outer))
        return max(flops / (self.flops_per_s * shape), moved / self.bytes_per_s)

    def moved_s(self, num_bytes: float) -> float:
        """Seconds to read and write ``num_bytes`` in all."""
        return num_bytes / self.bytes_per_s


def update_bytes(size: int) -> int:
    """What a step moves for each parameter beside its gradient's sum: the norm, AdamW, the copy in a compute dtype of
    ``size`` bytes where that is not float32."""
    return NORM_BYTES + ADAMW_BYTES + (FLOAT + size if size != FLOAT else 0)


def layer_sample(
    kind: LayerKind, family: str, tp: int, batch: int, seq_len: int, rates: Rates, *, compiled: bool
) -> ComputeSample:
    """One layer of ``batch`` sequences on one of ``tp`` ranks."""
    layer = local_layer(kind, family, tp, seq_len, compiled=compiled)
    matmul_s = matmuls_s(layer.matrices, batch * layer.tokens, rates)
    scores_s, scores_back_s = (batch * layer.attentions * seconds for seconds in attention_s(layer, rates))
    again_s = batch * rates.moved_s(_moved_again_bytes(layer, rates.element_bytes))
    other_s = batch * rates.moved_s(_moved_once_bytes(layer, rates.element_bytes))
    operators = layer_operators(layer)
    forward_s = matmul_s + scores_s + again_s + other_s
    gradients_s = rates.moved_s(added_bytes(kind.parameters, tp, rates.element_bytes))
    frozen = matrices((p for p in kind.parameters if not p.trainable), tp, kind.experts_per_token)
    frozen_s = matmuls_s(frozen, batch * layer.tokens, rates)  # products that have no gradient of a weight
    backward_s = BACKWARD * (matmul_s + again_s + other_s) - frozen_s + scores_back_s + gradients_s
    shared, routed = (1, layer.ffn, 1.0), (layer.experts, layer.routed_ffn, layer.routed / max(layer.experts, 1))
    shared_s, routed_s = (
        matmuls_s(((count, layer.hidden, width, share),), batch * layer.tokens, rates) if count * width else 0.0
        for count, width, share in (shared, routed)
    )
    one_s = shared_s + routed_s  # of the MLP's products: up, gate or down
    last_s = one_s if layer.needs_output else 0.0  # if not, it does not run again
    levels: dict[Recompute, float] = {
        "selective": again_s + layer.kept_ups * routed_s + min(last_s, routed_s),
        "mlp": again_s + layer.kept_ups * one_s + last_s,
        "linears": again_s + matmul_s - one_s + last_s,
    }
    if compiled:  # and leaves it out, which a full recompute run operator by operator does not
        levels["full"] = max(forward_s - one_s + last_s, DISPATCH_S * (operators - (not layer.needs_output)))
    return _sample(kind.name, tp, batch, seq_len, forward_s, backward_s, operators, levels)


def layer_operators(layer: LocalLayer) -> int:
    """Kernels that the host launches in a layer's forward."""
    counts = COMPILED_OPERATORS if layer.compiled else OPERATORS
    return len(layer.matrices) + counts["region"] * layer.regions + counts["window"] * layer.windowed


def added_bytes(parameters: tuple[ParameterSpec, ...], tp: int, size: int) -> float:
    """What adding a microbatch's gradients to the float32 sums moves: each is read, and its sum read and written."""
    return sum(math.prod(p.local_shape(tp)) for p in parameters if p.trainable) * (size + 2 * FLOAT)


def matmuls_s(shapes: tuple[tuple[int, int, int, float], ...], tokens: float, rates: Rates) -> float:
    """Seconds in which ``tokens`` go through all of ``layer.matrices``."""
    return sum(rates.matmul_s(count, tokens * share, inner, outer) for count, outer, inner, share in shapes)


def attention_s(layer: LocalLayer, rates: Rates) -> tuple[float, float]:
    """Forward and backward of one sequence's scores and values: half of them where all later tokens are masked.

    Products and exponentials take turns: each score has 4 x head size FLOPs and one exponential, of which a device
    makes hundreds of times fewer (Shah et al. 2024, section 3.1), so that small heads are slower.
    """
    scores = layer.tokens * layer.span * layer.heads * (1 - layer.masked_share)
    product_s = 4.0 * scores * layer.head_dim / rates.flops_per_s
    exponential_s = scores / rates.exponentials_per_s
    moved_s = rates.moved_s(2 * layer.tokens * (layer.query + layer.key_value) * rates.element_bytes)
    return (
        max(product_s + exponential_s, moved_s),
        max(ATTENTION_BACKWARD * product_s + BACKWARD_EXPONENTIALS * exponential_s, BACKWARD * moved_s),
    )


def layer_moved_bytes(layer: LocalLayer, size: int) -> float:
    """What a layer's forward of one sequence reads and writes beside products and attention."""
    return _moved_again_bytes(layer, size) + _moved_once_bytes(layer, size)


def _moved_again_bytes(layer: LocalLayer, size: int) -> float:
    """What selective recompute repeats: norms, rotary positions, activations."""
    written_out = layer.rms and not layer.compiled
    norms = layer.regions * layer.chunk * layer.hidden * _norm_moved_bytes(written_out, size)
    inner = layer.tokens * layer.inner * _norm_moved_bytes(not layer.compiled, size)
    moved = COPY_MOVED if layer.compiled else ROTARY_MOVED
    rotary = layer.rotary * moved * layer.tokens * (layer.query + layer.key_value) * size
    width = layer.ffn + layer.routed * layer.routed_ffn
    return norms + layer.attentions * (inner + rotary) + layer.moved * layer.tokens * width * size


def _norm_moved_bytes(written_out: bool, size: int) -> int:
    """Bytes of each element: a LayerNorm is one kernel, and so is what is compiled; an RMS norm that is ``written_out``
    squares, averages and scales in float32."""
    if not written_out:
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
    """A lookup, or patches projected; cut vocabularies mask what is not theirs.  Of all stacks, if several.

    Backward adds rows into a new gradient of zeros, and that, whole, to the float32 sum.
    """
    size, stacks, own = rates.element_bytes, stack_tokens(spec, seq_len), beside_tower(spec)
    elements = batch * sum(tokens * width for tokens, width in stacks)
    passes = COPY_MOVED if tp == 1 else COPY_MOVED + 3 * COPY_MOVED
    zeros = sum(math.prod(p.local_shape(tp)) for p in own if p.trainable) * size
    gradient = zeros + added_bytes(own, tp, size)
    patches = sum(math.prod(p.shape) for p in own if len(p.shape) == 4)
    project_s = 2.0 * patches * batch * stacks[0][0] / rates.flops_per_s
    forward_s = rates.moved_s(passes * elements * size + batch * seq_len * TOKEN_ID) + project_s
    backward_s = rates.moved_s((passes + RESIDUAL_MOVED) * elements * size + gradient) + project_s
    return _sample("embedding", tp, batch, seq_len, forward_s, backward_s, OPERATORS["embedding"])


def head_sample(spec: ModelSpec, tp: int, batch: int, seq_len: int, rates: Rates) -> ComputeSample:
    """Norm, projection, cross entropy in float32 (maximum, shift, exponential, sum, gradient) and both products of its
    backward, all in the forward pass but for the norm's backward.

    The weight's gradient is added to its float32 sum with every chunk of tokens (``parallelize``, fused losses).
    """
    size, hidden = rates.element_bytes, spec.layers[-1].hidden_size
    tokens = batch * head_tokens(spec, seq_len)
    normed = batch * spec.layers[-1].tokens(seq_len) / head_cut(spec, tp) * hidden
    logits = tokens * head_rows(spec, tp)
    matmul_s = matmuls_s(matrices(spec.head.parameters, tp), tokens, rates)
    norm_s = rates.moved_s(normed * _norm_moved_bytes(uses_rms(spec.head), size))
    chunks = math.ceil(tokens / chunk_tokens(head_rows(spec, tp), size))
    added_s = chunks * rates.moved_s(added_bytes(spec.head.parameters[-1:], tp, size)) if size != FLOAT else 0.0
    products = 1 + BACKWARD - (not spec.head.parameters[-1].trainable)
    forward_s = products * matmul_s + norm_s + rates.moved_s(logits * (5 * size + 10 * FLOAT)) + added_s
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
