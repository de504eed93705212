"""What an unmodified twin computes, and how another way to run it is held against that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from galvatron.core.errors import ConfigError
from galvatron.core.tasks import TOKEN_TASKS
from galvatron.models import Family, task_of, twin_model
from galvatron.models.sizes import CLASSES, WORDS
from galvatron.models.twin import run_twin, twin_inputs

from .finding import Finding

TOLERANCE = 1e-4
"""Of a unit's largest gradient; what is right differs by 1e-6 of it, the smallest wrong found by 1e-2."""
ROWS, SEQ_LEN = 2, 16
RUNS = 3
"""Of what may draw random numbers: of few tokens it seldom comes to the same in all."""
Gradients = dict[str, Tensor]
"""By name of the parameter."""
Way = Callable[[PretrainedConfig, Family], tuple[float, Gradients]]
"""To run a twin: its loss, and its gradients."""


def batch_of(twin: PretrainedConfig) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of the twin's task, and labels."""
    of_tokens, generator = task_of(twin) in TOKEN_TASKS, torch.Generator().manual_seed(1)
    shape, most = ((ROWS, SEQ_LEN), WORDS) if of_tokens else ((ROWS,), CLASSES)
    return twin_inputs(twin, ROWS), torch.randint(most, shape, generator=generator)


@dataclass(frozen=True)
class Truth:
    """What the unmodified twin computes: its loss, and its gradients by name."""

    loss: float
    gradients: Mapping[str, Tensor]

    @staticmethod
    def of(twin: PretrainedConfig, attention: str = "eager") -> Truth:
        """Run it once."""
        model, (inputs, labels) = twin_model(twin, attention=attention), batch_of(twin)
        if task_of(twin) == "contrast":
            loss = ROWS * model(**inputs, return_loss=True).loss
        else:
            logits = run_twin(model, inputs)
            if logits.shape[:-1] != labels.shape:
                raise ConfigError(
                    f"it gives logits of {list(logits.shape[:-1])} for labels of {list(labels.shape)}: of other tokens"
                )
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return Truth(loss.item(), found)

    def problem(self) -> Finding | None:
        """Why nothing can be compared with it."""
        if not (math.isfinite(self.loss) and all(bool(g.isfinite().all()) for g in self.gradients.values())):
            return Finding("unfit", "its loss or gradients are not finite")
        return None if any(bool(g.any()) for g in self.gradients.values()) else Finding("unfit", "it has no gradients")

    def varies(self, twin: PretrainedConfig) -> bool:
        """Whether the twin comes to something else when it runs again."""
        return not all(math.isclose(Truth.of(twin).loss, self.loss, rel_tol=1e-6) for _ in range(RUNS))

    def against(self, way: Way, twin: PretrainedConfig, family: Family) -> Finding | None:
        """What is wrong with another way to run the twin."""
        try:
            loss, gradients = way(twin, family)
        except Exception as failure:  # of any kind: a foreign model runs there
            return Finding.of(failure)
        differing = self._differing(loss, gradients)
        return Finding("differs", detail=differing) if differing else None

    def by_default(self, twin: PretrainedConfig) -> Finding | None:
        """What differs in SDPA: a type that attends by itself runs eagerly, unlike in transformers."""
        try:
            usual = Truth.of(twin, "sdpa")
        except ValueError:  # it has none
            return None
        differing = self._differing(usual.loss, usual.gradients)
        return Finding("differs", "its eager attention is not its attention by SDPA", differing) if differing else None

    def _differing(self, loss: float, gradients: Mapping[str, Tensor]) -> str:
        """What is another, as a sentence; "" if nothing is."""
        if abs(loss - self.loss) > TOLERANCE * abs(self.loss):
            return f"the loss is {loss:.6g}, not {self.loss:.6g}"
        largest: dict[str, float] = {}
        for name, wanted in self.gradients.items():
            largest[_unit(name)] = max(float(wanted.abs().max()), largest.get(_unit(name), 0.0))
        for name, wanted in self.gradients.items():
            scale = largest[_unit(name)]
            error = float((gradients[name] - wanted).abs().max()) if name in gradients else float("inf")
            if not error <= TOLERANCE * scale:
                return f"the gradient of {name} is off by {error / max(scale, 1e-30):.2g} of its unit's largest"
        if more := sorted(name for name in gradients.keys() - self.gradients.keys() if bool(gradients[name].any())):
            return f"{more[0]} has a gradient, which it has not in the whole twin"
        return ""


def _unit(name: str) -> str:
    """A layer by its index, the rest by itself: of one layer gradients are of one size."""
    numbers = [i for i, part in enumerate(name.split(".")) if part.isdigit()]
    return ".".join(name.split(".")[: numbers[0] + 1]) if numbers else name
