"""Peak memory on CPU: what lasts, plus the most that one step has alive at once."""

from __future__ import annotations

import torch
from train_fakes import FakeModel, section

from galvatron.train.memory import PeakMemory
from galvatron.train.optimizer import build_optimizer

MIB = 2**20


def test_the_first_step_is_counted_and_later_ones_are_not() -> None:
    model = FakeModel.make()
    optimizer = build_optimizer(model.local_parameters, section())
    memory = PeakMemory(torch.device("cpu"))
    assert memory.bytes() == 0
    with memory.watch(model, optimizer):
        first = torch.empty(2 * MIB, dtype=torch.uint8)
        second = torch.empty(MIB, dtype=torch.uint8)
        del first, second
        torch.empty(MIB, dtype=torch.uint8)
    weights = sum(part.tensor.numel() for part in model.local_parameters)
    lasting = 3 * 4 * weights + 4 * len(model.local_parameters)  # weights, two moments, AdamW's count of updates
    assert memory.bytes() == lasting + 3 * MIB
    with memory.watch(model, optimizer):
        torch.empty(8 * MIB, dtype=torch.uint8)
    assert memory.bytes() == lasting + 3 * MIB
