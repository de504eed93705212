"""The certificate where the loss takes its tokens in many chunks, as large vocabularies make it do."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from galvatron.parallelize.losses import fused
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.compare import RankFindings, compare_on_rank
from galvatron.testing.sweep import Sweep, variant_spec

BATCH, MICROBATCHES, SEQ_LEN = 8, 4, 16
CHUNK_BYTES = {1: 8 * 104 * 4, 2: 8 * 48 * 4}
"""By tp: eight tokens of all rows; and of 48, but four of 49 (LLaMA's 97 rows are cut so)."""


def compare_in_chunks(path: Path, plan: Plan, engine: str | None) -> RankFindings:
    """As ``compare_on_rank``."""
    tokens: list[int] = []
    take_chunk = fused._take_chunk

    def take(*args: object) -> object:
        tokens.append(len(args[0]))  # type: ignore[arg-type]
        return take_chunk(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "CHUNK_BYTES", CHUNK_BYTES[plan.head.tp])
        patch.setattr(fused, "_take_chunk", take)
        findings = compare_on_rank(path, plan, engine)
    assert max(tokens, default=0) <= 8 < BATCH // MICROBATCHES * SEQ_LEN // plan.head.dp
    return findings


@pytest.mark.parametrize("variant", ["qwen2", "llama"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("kind", ["pp", "dp", "tp"])
def test_many_chunks(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, variant: str, schedule: str, kind: str) -> None:
    layers = variant_spec(variant, 2).num_layers
    strategy = {"pp": LayerStrategy(), "dp": LayerStrategy(dp_replicate=2), "tp": LayerStrategy(tp=2)}[kind]
    plan = Plan.model_validate(
        {
            "model": variant,
            "world_size": 2,
            "layers_per_stage": (2, layers - 2) if kind == "pp" else (layers,),
            "schedule": schedule,
            "num_microbatches": MICROBATCHES,
            "global_batch_size": BATCH,
            "seq_len": SEQ_LEN,
            "embedding": strategy,
            "layers": (strategy,) * layers,
            "head": strategy,
        }
    )
    # a module that its package hides behind the function of its name
    monkeypatch.setattr(importlib.import_module("galvatron.testing.parity"), "compare_on_rank", compare_in_chunks)
    report = sweep.parity(variant, plan)
    assert report.ok, report.explain()
