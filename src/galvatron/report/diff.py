"""What differs between two plans, in words."""

from __future__ import annotations

from collections.abc import Iterator

from galvatron.core.units import format_bytes, format_seconds
from galvatron.plan.plan import LayerStrategy, Plan, Prediction

FIELDS = (
    ("model", "model"),
    ("world_size", "devices"),
    ("schedule", "schedule"),
    ("num_microbatches", "microbatches"),
    ("global_batch_size", "global batch size"),
    ("seq_len", "sequence length"),
    ("precision", "precision"),
    ("grad_reduce_dtype", "gradients summed in"),
)


def diff_plans(a: Plan, b: Plan) -> str:
    """One line a difference, ``what: in a -> in b``; what both plans predict differently comes last."""
    lines = [*_outside(a, b), *_units(a, b), *_predictions(a.prediction, b.prediction)]
    return "\n".join(lines) if lines else "the plans are equal"


def _outside(a: Plan, b: Plan) -> Iterator[str]:
    ours, theirs = a.describe_stages(), b.describe_stages()
    if ours != theirs:
        yield f"pipeline: {ours} -> {theirs}"
    for field, word in FIELDS:
        if getattr(a, field) != getattr(b, field):
            yield f"{word}: {getattr(a, field)} -> {getattr(b, field)}"


def _units(a: Plan, b: Plan) -> Iterator[str]:
    if a.embedding != b.embedding:
        yield f"embedding: {a.embedding} -> {b.embedding}"
    if len(a.layers) != len(b.layers):
        yield f"number of layers: {len(a.layers)} -> {len(b.layers)}"
    for first, last, ours, theirs in _runs(a.layers, b.layers):
        if ours != theirs:
            layers = f"layers {first}-{last}" if last > first else f"layer {first}"
            yield f"{layers}: {ours} -> {theirs}"
    if a.head != b.head:
        yield f"head: {a.head} -> {b.head}"


def _runs(
    a: tuple[LayerStrategy, ...], b: tuple[LayerStrategy, ...]
) -> Iterator[tuple[int, int, LayerStrategy, LayerStrategy]]:
    """Runs of the layers that both have, over which neither changes: (first, last, in a, in b)."""
    pairs = list(zip(a, b, strict=False))
    start = 0
    for index, pair in enumerate(pairs):
        if index + 1 == len(pairs) or pairs[index + 1] != pair:
            yield start, index, *pair
            start = index + 1


def _predictions(a: Prediction | None, b: Prediction | None) -> Iterator[str]:
    if a is None or b is None:
        return
    if a.step_time_s != b.step_time_s:
        change = b.step_time_s / a.step_time_s - 1
        yield (
            f"step time (predicted): {format_seconds(a.step_time_s)} -> {format_seconds(b.step_time_s)} ({change:+.1%})"
        )
    if a.compiled != b.compiled:
        words = ("not compiled", "compiled")
        yield f"layers (predicted): {words[a.compiled]} -> {words[b.compiled]}"
    ours = [stage.peak_memory_bytes for stage in a.stages]
    theirs = [stage.peak_memory_bytes for stage in b.stages]
    if ours != theirs:
        yield f"memory by stage (predicted): {_listed(ours)} -> {_listed(theirs)}"


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(format_bytes, sizes))
