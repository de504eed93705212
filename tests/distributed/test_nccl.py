"""Ranks on GPUs, over NCCL: what gloo ranks do on the CPU.  Ranks share GPUs where there are fewer of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from galvatron.testing import Pool
from galvatron.testing.plans import pure_plans, random_plans
from galvatron.testing.sweep import Sweep, variant_spec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    with Pool(device="cuda", start="spawn") as pool:
        yield Sweep(pool, tmp_path_factory.mktemp("references"))


@pytest.mark.parametrize("variant", ["llama", "mixtral", "gpt_oss", "t5"])
def test_every_technique_equals_one_process(sweep: Sweep, variant: str) -> None:
    for name, plan in pure_plans(variant_spec(variant, 2), 2).items():
        report = sweep.parity(variant, plan)
        assert report.ok, f"{name}: {report.explain()}"


@pytest.mark.parametrize("variant", ["llama", "mixtral", "clip", "bert"])
def test_mixes_equal_one_process(sweep: Sweep, variant: str) -> None:
    for plan in random_plans(variant_spec(variant, 4), 4, 4, seed=1):
        report = sweep.parity(variant, plan)
        assert report.ok, report.explain()
