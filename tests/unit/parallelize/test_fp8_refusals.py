"""fp8 products are refused, in a sentence and before the model is taken, where they cannot be."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from galvatron.core.errors import ConfigError, GalvatronError, PlanError
from galvatron.models import build_spec
from galvatron.parallelize import World, destroy_world, init_world, parallelize
from galvatron.parallelize.layers import fp8
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import tiny_config, tiny_model

ONE = LayerStrategy()
PLAN = Plan(
    model="tiny", world_size=1, layers_per_stage=(4,), embedding=ONE, layers=(ONE,) * 4, head=ONE, global_batch_size=4,
    seq_len=16, precision="bf16",
)  # fmt: skip


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_world("cpu")
    destroy_world()


@pytest.mark.parametrize(
    ("installed", "emulated", "family", "changes", "error", "words"),
    [
        (False, True, "llama", {}, ConfigError, r"fp8 needs torchao, .*; pip install 'galvatron\[fp8\]'"),
        (True, False, "llama", {"precision": "fp32"}, ConfigError, "go with precision=bf16 for all else, got fp32"),
        (True, False, "llama", {}, ConfigError, r"devices of compute capability 8\.9 or above .*, got cpu"),
        (
            True,
            True,
            "llama",
            {"schedule": "zero_bubble"},
            PlanError,
            "no backward in two passes, as schedule=zero_bubble has",
        ),
        (True, True, "gpt2", {}, ConfigError, "layers with torch's linears, and GPT2Block has none"),
        (
            True,
            True,
            "llama",
            {"seq_len": 24},
            PlanError,
            r"sizes that 16 divides, but with tp=1 and 24 tokens a sequence a rank",
        ),
    ],
)
def test_what_cannot_be(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    installed: bool,
    emulated: bool,
    family: str,
    changes: dict[str, object],
    error: type[GalvatronError],
    words: str,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(fp8, "EMULATED", emulated)
    model = tiny_model(family)
    with pytest.raises(error, match=words):
        parallelize(model, PLAN.model_copy(update=changes), world=world, fp8=True)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_cut_that_leaves_sizes_which_kernels_do_not_take() -> None:
    kind = build_spec(tiny_config("llama", hidden_size=64, intermediate_size=96)).layer
    assert fp8.fp8_problem(kind, 2, 16) is None
    assert fp8.fp8_problem(kind, 4, 16) is not None


def test_an_older_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(ConfigError, match="got NVIDIA A100-SXM4-80GB; leave it out"):
        fp8.check_fp8(tiny_model("llama"), None, torch.device("cuda"), "bf16")  # type: ignore[arg-type]
