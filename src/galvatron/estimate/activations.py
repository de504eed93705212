"""Bytes that a microbatch leaves behind, by formula: what autograd keeps of the runtime's own modules.

Takes a model's shapes; gives ActivationSamples.  The formulas follow Korthikanti et al. 2022 (section 4), with flash
attention in place of scores, the gathered input of a region kept whole on every rank, and Hugging Face's modules as
they are: an RMS norm in a half keeps a float32 copy of its input.  Compiled layers keep what goes into and comes out of
products and attention, and of norms a number a token.  Where ``profile`` can count, they give its counts.
"""

from __future__ import annotations

import math

from galvatron.core.model import LayerKind, ModelSpec, ParameterSpec, Precision, Recompute, UnitName
from galvatron.core.model_profile import ActivationSample
from galvatron.core.tasks import TOKEN_TASKS
from galvatron.core.units import DTYPE_BYTES

from .layer import LocalLayer, local_layer, uses_rms

FLOAT = DTYPE_BYTES["fp32"]
TOKEN_ID = 8  # bytes of an int64
EMBEDDING_COPIES, NORMED_COPIES = 2.0, 3.5
"""Hidden states of whole sequences at the peak of an embedding's backward: of sums alone; with a norm over them.
[Empirical: 2026-11, counted on fake tensors of BERT's, RoBERTa's, ViT's and DINOv2's]"""
CHUNK_BYTES, BLOCK_BYTES, SLICE_ROWS = 512 * 2**20, 128 * 2**20, 1 << 14
"""How the runtime's fused loss works (``losses/fused.py`` and ``layers/later.py`` of ``parallelize``): what a chunk's
logits take in the compute dtype and a block of them in float32, and rows of the weight's gradient summed at a time."""
NORM_COPIES = {"bf16": 4, "fp16": 4, "fp32": 2}
"""Copies of a rank's chunk of hidden states at the peak of an RMS norm's backward; a LayerNorm's are 3.
[Empirical: 2026-11, counted on fake tensors of the runtime's layers]"""
LAYER_NORM_COPIES = 3


def layer_activations(
    kind: LayerKind, family: str, tp: int, recompute: Recompute, seq_len: int, precision: Precision, *, compiled: bool
) -> ActivationSample:
    """One layer's bytes of one sequence on one of ``tp`` ranks."""
    layer, size = local_layer(kind, family, tp, seq_len, compiled=compiled), DTYPE_BYTES[precision]
    boundary = kind.entering_elements(kind.tokens(seq_len)) / tp * size
    every = _saved(layer, size) + boundary - layer.chunk * layer.hidden * size
    saved = every if recompute == "none" else boundary + _kept(layer, recompute, size)
    workspace = _workspace(layer, precision)
    return _sample(kind.name, tp, recompute, seq_len, saved, workspace + every - min(saved, every))


def _saved(layer: LocalLayer, size: int) -> float:
    """All that autograd keeps without recompute, the layer's input included."""
    return layer.regions * _region(layer, size) + layer.attentions * _attention(layer, size) + _mlp(layer, size)


def _region(layer: LocalLayer, size: int) -> float:
    """Around every region: what its norm keeps, and its input, whole."""
    norm = _norm_bytes(layer.rms, size, layer.hidden, fused=layer.compiled) * layer.chunk
    return norm + layer.tokens * layer.hidden * size


def _norm_bytes(rms: bool, size: int, width: int, *, fused: bool) -> float:
    """A token's bytes: in float32 its input (in a half a copy), the normed and 1 / rms; or input, mean and 1 / std.

    ``fused``: an RMS norm keeps its input as it is, and 1 / rms.
    """
    if rms and not fused:
        return width * (FLOAT + size) + FLOAT
    return width * size + (1 if rms else 2) * FLOAT


def _attention(layer: LocalLayer, size: int) -> float:
    """Query, key, value and output, a log-sum-exp a head, and the norms inside."""
    elements = 2 * layer.query + 2 * layer.key_value
    inner = layer.inner * (size + FLOAT / layer.head_dim if layer.compiled else FLOAT + size)
    return layer.tokens * (size * elements + FLOAT * layer.heads + inner)


def _mlp(layer: LocalLayer, size: int) -> float:
    """What activations keep of the width, and of every expert's copy of a token its input and output."""
    width = layer.kept * (layer.ffn + layer.routed * layer.routed_ffn)
    return layer.tokens * size * (width + 2 * layer.routed * layer.hidden)


def _kept(layer: LocalLayer, recompute: Recompute, size: int) -> float:
    """What a layer that recomputes keeps beside its input: of attention, then of linears, as far as its level says.

    The last region's output is among them where the layer needs it again.  Experts always run again.  Sums over
    tensor-parallel ranks are kept where a single rank's linears are not.
    """
    if recompute == "full":
        return 0.0
    has_linears = recompute != "linears"
    projected = 2 * layer.key_value + layer.query if has_linears else 0
    attention = layer.tokens * (size * (layer.query + projected) + FLOAT * layer.heads)
    output = layer.chunk * layer.hidden * size
    kept = layer.attentions * (attention + (has_linears or layer.tp > 1) * output)
    if recompute == "selective":
        kept += layer.tokens * size * layer.kept_ups * layer.ffn
    if layer.needs_output and not layer.experts and (recompute == "selective" or layer.tp > 1):
        kept += output
    return kept


def _workspace(layer: LocalLayer, precision: Precision) -> float:
    """The peak of backward: gradients of the MLP's width, or of a gathered input and its norm."""
    size = DTYPE_BYTES[precision]
    width = layer.ffn + layer.routed * (layer.routed_ffn + layer.hidden)
    mlp = layer.chunk * layer.hidden + 2 * layer.tokens * width
    copies = NORM_COPIES[precision] if layer.rms and not layer.compiled else LAYER_NORM_COPIES
    norm = (2 * layer.tokens + copies * layer.chunk) * layer.hidden
    return size * max(mlp, norm)


def embedding_activations(spec: ModelSpec, tp: int, seq_len: int, precision: Precision) -> ActivationSample:
    """Token ids (and which of them are this rank's); the tables that all layers share are fixed bytes."""
    size, kind = DTYPE_BYTES[precision], spec.layers[0]
    layer = local_layer(kind, spec.family, 1, seq_len, compiled=False)
    ids = seq_len * (TOKEN_ID + (tp > 1))
    rotary = 2 * seq_len * kind.head_dim * size if layer.rotary else 0
    if spec.ends == "whole":
        return _whole_embedding(spec, tp, seq_len, size, ids, rotary)
    learned = any("position" in p.name or "wpe" in p.name for p in spec.embedding.parameters)
    positions = min(1 / tp, 0.5) if learned else 0  # one for a microbatch of two sequences or more
    workspace = seq_len * spec.hidden_size * size * ((3 if tp > 1 else 1) + positions) + ids
    return _sample("embedding", tp, "none", seq_len, ids, workspace, fixed=seq_len * TOKEN_ID + rotary)


def stack_tokens(spec: ModelSpec, seq_len: int) -> list[tuple[int, int]]:
    """(tokens of a sequence, hidden size) of what enters every stack, of several a side's beside it."""
    if spec.stacks == 1:
        return [(seq_len, spec.hidden_size)]
    kinds = {(k.tokens(seq_len), k.hidden_size, k.side_inputs, k.causal): k for k in spec.layers}
    return [(kind.tokens(seq_len) * (1 + kind.side_inputs), kind.hidden_size) for kind in kinds.values()]


def beside_tower(spec: ModelSpec) -> tuple[ParameterSpec, ...]:
    """The embedding's parameters but those of a tower (``estimate.tower``)."""
    every, tower = spec.embedding.parameters, spec.tower
    return every if tower is None else tuple(p for p in every if not p.name.startswith(tower.within))


def _whole_embedding(spec: ModelSpec, tp: int, seq_len: int, size: int, ids: int, rotary: int) -> ActivationSample:
    """All tokens on every rank: ids, and the input of a norm; images are counted with a step (``cost.memory``)."""
    normed = any("norm" in p.name.lower() for p in beside_tower(spec))
    saved = 0 if spec.task == "image_classification" else ids * (1 + (spec.task == "seq2seq_lm"))
    hidden = sum(tokens * width for tokens, width in stack_tokens(spec, seq_len)) * size
    copies = (NORMED_COPIES if normed else EMBEDDING_COPIES) + (tp > 1) / 2
    norm = normed * (hidden + 2 * seq_len * FLOAT)
    return _sample("embedding", tp, "none", seq_len, saved + norm, copies * hidden + saved, fixed=rotary)


def head_tokens(spec: ModelSpec, seq_len: int) -> int:
    """Tokens of a sequence that are projected: a classifier and a contrast see one."""
    return spec.layers[-1].tokens(seq_len) if spec.task in TOKEN_TASKS else 1


def head_cut(spec: ModelSpec, tp: int) -> int:
    """Into how many parts a head's work on tokens is cut: none where it sees whole sequences."""
    return 1 if spec.ends == "whole" else tp


def head_rows(spec: ModelSpec, tp: int) -> int:
    """Words or classes of which a rank has the logits."""
    is_cut = spec.ends == "tokens" or any(p.cut is not None for p in spec.head.parameters)
    return math.ceil(spec.vocab_size / tp) if is_cut else spec.vocab_size


def head_activations(spec: ModelSpec, tp: int, seq_len: int, precision: Precision) -> ActivationSample:
    """What the norm keeps, and the gradient of the projection's whole input; the loss works in chunks of tokens.

    Of heads that see whole sequences also what goes into and comes out of other linears; a classifier's token is a view
    of all.
    """
    size, hidden, cut = DTYPE_BYTES[precision], spec.layers[-1].hidden_size, head_cut(spec, tp)
    normed, tokens = spec.layers[-1].tokens(seq_len), head_tokens(spec, seq_len)
    norms = 1 if spec.ends == "tokens" else any("norm" in p.name.lower() for p in spec.head.parameters)
    dense = _other_linears(spec) * 2 * tokens
    projected = normed if spec.ends == "whole" else tokens
    saved = norms * _norm_bytes(uses_rms(spec.head), size, hidden, fused=False) * normed / cut
    saved += (projected + dense) * hidden * size
    copies = 2 if uses_rms(spec.head) and precision != "fp32" else 1  # before and after the norm's weight
    passing = (copies * normed / cut + (tp > 1) * normed + dense) * hidden * size
    sample = _sample("head", tp, "none", seq_len, saved, passing)
    return sample.model_copy(update=_chunked(sample, head_rows(spec, tp), tokens, hidden, precision))


def _other_linears(spec: ModelSpec) -> int:
    """Linears between the layers and the last one of the head, where it sees whole sequences."""
    if spec.ends == "tokens":
        return 0
    return max(sum(len(p.shape) == 2 for p in spec.head.parameters) - 1, 0)


def _chunked(
    sample: ActivationSample, rows: int, tokens: int, hidden: int, precision: Precision
) -> dict[str, int | tuple[int, int] | None]:
    """The workspace of ``sample`` with logits: a line up to a chunk of tokens, a flatter one beyond."""
    size, casts = DTYPE_BYTES[precision], precision != "fp32"
    chunk, block = chunk_tokens(rows, size), casts * _fitting(BLOCK_BYTES, rows * FLOAT)
    slices = casts * min(rows, SLICE_ROWS) * hidden * size
    passing = sample.workspace_bytes_per_sequence
    beyond = (rows * chunk * size + max(rows * block * FLOAT, slices), passing)
    if 2 * tokens > chunk:
        return {"workspace_fixed_bytes": beyond[0]}
    in_blocks = min(tokens, block) * FLOAT
    fixed = rows * in_blocks if tokens > block else max(slices - rows * in_blocks, 0)
    growing = rows * (tokens * size + (0 if tokens > block else in_blocks))
    return {
        "workspace_fixed_bytes": fixed,
        "workspace_bytes_per_sequence": passing + growing,
        "workspace_beyond": beyond,
    }


def chunk_tokens(rows: int, size: int) -> int:
    """Tokens whose logits of ``rows`` words the fused loss makes at a time."""
    return _fitting(CHUNK_BYTES, rows * size)


def _fitting(num_bytes: int, token_bytes: int) -> int:
    """The largest power of two of tokens that fits."""
    return 1 << max(num_bytes // token_bytes, 1).bit_length() - 1


def _sample(
    unit: UnitName, tp: int, recompute: Recompute, seq_len: int, saved: float, workspace: float, fixed: int = 0
) -> ActivationSample:
    return ActivationSample(
        unit=unit,
        tp=tp,
        recompute=recompute,
        seq_len=seq_len,
        fixed_bytes=fixed,
        bytes_per_sequence=math.ceil(saved),
        workspace_bytes_per_sequence=math.ceil(workspace),
    )
