"""The example of a user's own training loop, under torchrun, against plain transformers in one process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_loop.py"


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], dict[str, torch.Tensor]]:
    """What one process computes without Galvatron: ten losses, and the weights after them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    text = torch.tensor(list(EXAMPLE.read_bytes()))
    losses = []
    for _ in range(10):
        tokens = torch.stack([text[start : start + 65] for start in torch.randint(len(text) - 64, (8,))])
        logits = model(tokens[:, :-1], use_cache=False).logits.flatten(0, 1)
        loss = F.cross_entropy(logits, tokens[:, 1:].flatten(), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_its_losses_and_weights_are_those_of_one_process(
    tmp_path: Path, plain: tuple[list[float], dict[str, torch.Tensor]], num_processes: int
) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), str(EXAMPLE)]
    run = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run.stdout)]
    assert losses == pytest.approx(plain[0], rel=2e-6)
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "own_loop").state_dict()
    for name, expected in plain[1].items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_it_fits_on_a_page() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 40
