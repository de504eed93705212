"""How the engine behind published runs differs from the one that estimates describe.

The runs were made by Megatron-DeepSpeed under PyTorch 2.0.  What it did otherwise is taken from the code and settings
that vTrain publishes to reproduce them (github.com/VIA-Research/vTrain: ``config/validation``, ``src/model``), none of
it from the times of the runs:

* sums of gradients after the last backward, beside nothing (``use_gradient_bucket: false``), in 16 bits;
* 800 Gb/s between nodes (``inter_node_bandwidth``): half an adapter a device, where a DGX A100 has a whole one;
* scores written out: their product, a fused mask and softmax, dropout of 0.1, the values' product;
* logits written out, in 16 bits and for the loss in float32;
* norms, bias with GELU, and bias with dropout and sum fused, all else launched operator by operator;
* full recompute repeats a layer whole.
"""

from __future__ import annotations

from galvatron.core.hardware import HardwareProfile, Overlap
from galvatron.core.model import LayerKind, ModelSpec
from galvatron.core.model_profile import ComputeSample, ModelProfile
from galvatron.core.units import DTYPE_BYTES
from galvatron.estimate import ClusterShape, compute
from galvatron.estimate.devices import preset
from galvatron.estimate.layer import local_layer, matrices

LINKS = ("inter=100Gb/s",)
GRADIENT_DTYPE = "bf16"  # of fp16's size
FLOAT, HALF = DTYPE_BYTES["fp32"], DTYPE_BYTES["bf16"]
MASK = 1  # byte of dropout's mask
# Bytes of every score.  Forward: written, read by the softmax, written, read by dropout, written with its mask, read.
SCORE_FORWARD = 6 * HALF + MASK
# Backward: dropped-out ones read for values' gradients; their own gradient written, read by dropout with its mask,
# written, read by the softmax with its output, written, read twice for gradients of queries and keys.
SCORE_BACKWARD = 9 * HALF + MASK
# Bytes of every logit.  Forward: written, cast to float32; maximum, shift, exponential, sum, division.  Backward: the
# softmax read and written where labels are, scaled, cast, read by both products.
LOGIT_FORWARD, LOGIT_BACKWARD = HALF + 7 * FLOAT, 2 * HALF + 8 * FLOAT


def hardware_of(shape: ClusterShape) -> HardwareProfile:
    """The cluster where communication and compute together take as long as one after the other."""
    return shape.profile().model_copy(update={"overlap": Overlap(compute_slowdown=2.0, communication_slowdown=2.0)})


def model_of(model: ModelProfile, device: str) -> ModelProfile:
    """``model``, a compiled estimate, as that engine computes it."""
    rates = compute.Rates.of(preset(device), model.precision)
    samples = tuple(_sample(model.spec, sample, rates) for sample in model.compute)
    return model.model_copy(update={"compute": samples})


def _sample(spec: ModelSpec, sample: ComputeSample, rates: compute.Rates) -> ComputeSample:
    if sample.unit == "embedding":
        return sample
    return _head(spec, sample, rates) if sample.unit == "head" else _layer(spec.kind(sample.unit), spec, sample, rates)


def _layer(kind: LayerKind, spec: ModelSpec, sample: ComputeSample, rates: compute.Rates) -> ComputeSample:
    tp, batch, seq_len = sample.tp, sample.batch, sample.seq_len
    fused = local_layer(kind, spec.family, tp, seq_len, compiled=True)
    products_s = compute.matmuls_s(fused.matrices, batch * fused.tokens, rates)
    scores = batch * fused.heads * fused.tokens**2  # masked ones too
    scores_s = 4.0 * scores * fused.head_dim / rates.flops_per_s
    other_s = batch * rates.moved_s(compute.layer_moved_bytes(fused, HALF))
    added_s = rates.moved_s(compute.added_bytes(kind.parameters, tp, HALF))
    host_s = compute.DISPATCH_S * compute.layer_operators(local_layer(kind, spec.family, tp, seq_len, compiled=False))
    forward_s = products_s + scores_s + other_s + rates.moved_s(scores * SCORE_FORWARD)
    backward_s = compute.BACKWARD * (products_s + scores_s + other_s) + rates.moved_s(scores * SCORE_BACKWARD)
    return sample.model_copy(
        update={
            "forward_s": max(forward_s, host_s),
            "backward_s": max(backward_s + added_s, compute.BACKWARD_DISPATCH * host_s),
            "again_s": {},
        }
    )


def _head(spec: ModelSpec, sample: ComputeSample, rates: compute.Rates) -> ComputeSample:
    tokens, hidden = sample.batch * sample.seq_len, spec.layers[-1].hidden_size
    products_s = compute.matmuls_s(matrices(spec.head.parameters, sample.tp), tokens, rates)
    norm_s = rates.moved_s(tokens / sample.tp * hidden * 2 * HALF)
    logits = tokens * spec.head.parameters[-1].local_shape(sample.tp)[0]
    added_s = rates.moved_s(compute.added_bytes(spec.head.parameters[-1:], sample.tp, HALF))
    forward_s = products_s + norm_s + rates.moved_s(logits * LOGIT_FORWARD)
    backward_s = compute.BACKWARD * (products_s + norm_s) + rates.moved_s(logits * LOGIT_BACKWARD) + added_s
    return sample.model_copy(update={"forward_s": forward_s, "backward_s": backward_s})
