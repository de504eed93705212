"""Synthetic profiles for tests: a small LLaMA-like model and a cluster whose links are made up."""

from __future__ import annotations

import random

from galvatron.core.hardware import OPS, Device, HardwareProfile, Link, Overlap
from galvatron.core.model import ENDS, Cut, LayerKind, ModelSpec, ParameterSpec, UnitName, UnitSpec
from galvatron.core.model_profile import ActivationSample, ComputeSample, ModelProfile
from galvatron.plan.axes import StageAxes, divisors

AGAIN = {"selective": 0.2, "mlp": 0.5, "linears": 0.7}
"""Levels of recompute between the two ends, with what part of a forward they run again."""
KEPT = {"selective": 2, "mlp": 3, "linears": 6}  # one over what part of all they keep


def make_spec(
    num_layers: int = 4,
    hidden: int = 64,
    ffn: int = 192,
    heads: int = 8,
    kv_heads: int = 4,
    vocab: int = 250,
    tied: bool = False,
    others: int = 0,
) -> ModelSpec:
    """``num_layers`` LLaMA-like layers, then ``others`` with experts, whose hidden states travel with a side input."""
    head_dim = hidden // heads
    columns = [
        ("q", (heads * head_dim, hidden), Cut(dim=0, segments=(heads,))),
        ("k", (kv_heads * head_dim, hidden), Cut(dim=0, segments=(kv_heads,), uneven="whole")),
        ("v", (kv_heads * head_dim, hidden), Cut(dim=0, segments=(kv_heads,), uneven="whole")),
        ("o", (hidden, heads * head_dim), Cut(dim=1, segments=(heads,))),
        ("up", (ffn, hidden), Cut(dim=0, segments=(ffn,))),
        ("gate", (ffn, hidden), Cut(dim=0, segments=(ffn,))),
        ("down", (hidden, ffn), Cut(dim=1, segments=(ffn,))),
        ("norm1", (hidden,), None),
        ("norm2", (hidden,), None),
    ]
    layer = tuple(ParameterSpec(name=name, shape=shape, cut=cut) for name, shape, cut in columns)
    vocabulary = Cut(dim=0, segments=(vocab,), uneven="ceil")
    word = ParameterSpec(name="embed.weight", shape=(vocab, hidden), cut=vocabulary)
    norm = ParameterSpec(name="norm.weight", shape=(hidden,))
    out = word if tied else ParameterSpec(name="lm_head.weight", shape=(vocab, hidden), cut=vocabulary)
    return ModelSpec(
        name="toy",
        family="llama",
        layers=(
            LayerKind(
                count=num_layers,
                hidden_size=hidden,
                ffn_size=ffn,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                parameters=layer,
            ),
            *([_other_kind(others, hidden, ffn, heads, kv_heads, layer)] if others else []),
        ),
        vocab_size=vocab,
        max_seq_len=4096,
        tied_embeddings=tied,
        embedding=UnitSpec(parameters=(word,)),
        head=UnitSpec(parameters=(norm, out)),
    )


def _other_kind(
    count: int, hidden: int, ffn: int, heads: int, kv_heads: int, layer: tuple[ParameterSpec, ...]
) -> LayerKind:
    experts = ParameterSpec(name="experts", shape=(4, ffn, hidden), cut=Cut(dim=1, segments=(ffn,)), experts=True)
    return LayerKind(
        name="other",
        count=count,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        parameters=(*layer[:4], experts),
        side_inputs=1,
        regions=3,
        num_experts=4,
        experts_per_token=2,
    )


def make_model(
    spec: ModelSpec | None = None,
    seq_len: int = 64,
    tps: tuple[int, ...] = (1, 2, 4, 8),
    flops_per_s: float = 1e10,
    seed: int | None = None,
    optimizer_s_per_parameter: float = 2e-9,
) -> ModelProfile:
    """Compute from FLOPs with a fixed cost a call; activations as a LLaMA layer saves them; ``seed`` shakes both."""
    spec = spec or make_spec()
    shake, between = random.Random(seed), random.Random(f"{seed} between")

    def noise(shake: random.Random = shake) -> float:
        return 1.0 if seed is None else shake.uniform(0.6, 1.6)

    compute, activations = [], []
    for unit in spec.units:
        for tp in tps:
            compute += _compute(spec, unit, tp, seq_len, flops_per_s, noise())
            for recompute in ("none",) if unit in ENDS else ("none", *AGAIN, "full"):
                shaken = noise(between if recompute in ("mlp", "linears") else shake)
                activations.append(_activations(spec, unit, tp, seq_len, recompute, shaken))
    return ModelProfile(
        spec=spec,
        device="made up",
        precision="fp32",
        seq_len=seq_len,
        compute=tuple(compute),
        activations=tuple(activations),
        optimizer_s_per_parameter=optimizer_s_per_parameter,
    )


def _compute(spec: ModelSpec, unit: UnitName, tp: int, seq_len: int, rate: float, noise: float) -> list[ComputeSample]:
    flops = 2.0 * spec.unit(unit).num_parameters * seq_len / tp * (0.01 if unit == "embedding" else 1.0)
    samples = []
    for batch in (1, 2, 4, 8):
        forward_s = noise * (flops * batch / rate + 2e-4)
        samples.append(
            ComputeSample(
                unit=unit,
                tp=tp,
                batch=batch,
                seq_len=seq_len,
                forward_s=forward_s,
                backward_s=2.1 * forward_s,
                again_s={} if unit in ENDS else {level: share * forward_s for level, share in AGAIN.items()},
            )
        )
    return samples


def _activations(
    spec: ModelSpec, unit: UnitName, tp: int, seq_len: int, recompute: str, noise: float
) -> ActivationSample:
    hidden_bytes = 4 * seq_len * spec.hidden_size
    chunk = hidden_bytes // tp
    saved = {"embedding": 0, "head": hidden_bytes}.get(unit, 4 * hidden_bytes + 12 * chunk)
    workspace = {"embedding": chunk, "head": 8 * seq_len * spec.vocab_size // tp}.get(unit, 4 * chunk)
    if recompute == "full":
        saved, workspace = chunk, saved + workspace
    if recompute in AGAIN:
        kept = saved // KEPT[recompute]
        saved, workspace = kept, (saved - kept) // 2 + workspace
    return ActivationSample.model_validate(
        {
            "unit": unit,
            "tp": tp,
            "recompute": recompute,
            "seq_len": seq_len,
            "fixed_bytes": 4 * seq_len,
            "bytes_per_sequence": int(noise * saved),
            "workspace_bytes_per_sequence": int(noise * workspace),
        }
    )


def make_hardware(
    world_size: int = 4,
    device: str = "cpu",
    memory_bytes: int = 2**30,
    latency_s: float = 1e-4,
    bytes_per_s: float = 2e9,
    slowdown: float = 1.1,
    seed: int | None = None,
    host_bytes_per_s: float | None = None,
) -> HardwareProfile:
    """Links slower with the size and the stride of their groups; ``seed`` shakes them."""
    shake = random.Random(seed)
    links = []
    for size, stride in _shapes(world_size):
        for op in OPS:
            if (op == "p2p") != (size == 0):
                continue
            noise = 1.0 if seed is None else shake.uniform(0.5, 2.0)
            members = size or 2
            factor = {"all_reduce": 2.0, "p2p": 1.0}.get(op, 1.0) * (1 if op == "p2p" else (members - 1) / members)
            reach = 1.0 + 0.5 * stride
            links.append(
                Link(
                    op=op,
                    size=members,
                    stride=stride,
                    latency_s=noise * latency_s * members,
                    seconds_per_byte=noise * factor * reach / bytes_per_s,
                )
            )
    return HardwareProfile.model_validate(
        {
            "device": Device.model_validate(
                {
                    "name": "made up",
                    "type": device,
                    "memory_bytes": memory_bytes,
                    "matmul_flops_per_s": {"fp32": 1e10},
                    "host_bytes_per_s": host_bytes_per_s,
                }
            ),
            "world_size": world_size,
            "devices_per_node": world_size,
            "backend": "gloo" if device == "cpu" else "nccl",
            "links": tuple(links),
            "overlap": Overlap(compute_slowdown=slowdown, communication_slowdown=slowdown),
        }
    )


def _shapes(world_size: int) -> list[tuple[int, int]]:
    """(size, stride) of every collective group; (0, stride) for p2p."""
    shapes = {(0, n) for n in divisors(world_size) if n < world_size}
    for stage in divisors(world_size):
        degrees = StageAxes(stage).degrees
        shapes |= {(outer // inner, inner) for inner in degrees for outer in degrees if outer > inner}
    return sorted(shapes)
