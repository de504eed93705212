"""A second plan to go on under: another than the chosen one in its pipeline or in the strategies of its layers.

Takes a search's result and its profiles; gives a plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress

from galvatron.core.errors import PlanError
from galvatron.core.hardware import HardwareProfile
from galvatron.core.model import RECOMPUTES
from galvatron.core.model_profile import ModelProfile
from galvatron.cost import predict
from galvatron.plan.plan import Plan

from .result import SearchResult, seconds_per_sample


def second_plan(result: SearchResult, model: ModelProfile, hardware: HardwareProfile) -> Plan | None:
    """The fastest other candidate; without one the fastest simple plan; without that the chosen plan varied.

    A model so small that its tasks and families all come to one plan has the last: another recompute in the first
    layer of a stage.  None where no other fits.
    """
    chosen = result.plan
    simple = sorted((plan for plan in result.baselines.values() if plan is not None), key=seconds_per_sample)
    for other in (*result.candidates, *simple):
        if (other.layers_per_stage, other.layers) != (chosen.layers_per_stage, chosen.layers):
            return other
    return min(_varied(result, model, hardware), key=seconds_per_sample, default=None)


def _varied(result: SearchResult, model: ModelProfile, hardware: HardwareProfile) -> Iterator[Plan]:
    plan, limit = result.plan, result.memory_limit_bytes
    for stage, level in itertools.product(range(plan.pp), RECOMPUTES):
        layers, first = list(plan.layers), plan.chunk_layers(stage).start
        layers[first] = layers[first].model_copy(update={"recompute": level})
        other = plan.model_copy(update={"layers": tuple(layers), "prediction": None})
        with suppress(PlanError):  # under zero bubble layers cannot keep a part
            prediction = predict(other, model, hardware, limit)
            if other.layers != plan.layers and prediction.peak_memory_bytes <= limit:
                yield other.model_copy(update={"prediction": prediction})
