"""Many parity checks with few references: plans of equal batch shape share one.

Takes variants and plans; gives reports.  Used by the tests and by ``benchmarks/parity_sweep.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from galvatron.core.model import ModelSpec
from galvatron.models import build_spec
from galvatron.plan import Plan

from .models import Variant
from .parity import ParityReport, decided, parity_with
from .plans import SEQ_LEN
from .pool import Pool
from .reference import Recipe, train_reference


def heads_for(world_size: int) -> int:
    """Attention heads of the tiny models in a world: 4, or 6 or 8 where a tp degree needs them."""
    return 6 if world_size % 3 == 0 else 8 if world_size % 8 == 0 else 4


def seq_len_for(world_size: int) -> int:
    """Tokens of a sequence that every degree of a world can cut."""
    return 24 if world_size % 3 == 0 else SEQ_LEN


@cache
def variant_spec(variant: str, world_size: int) -> ModelSpec:
    """The ModelSpec of the variant of that name for a world of that size."""
    found = Variant.named(variant)
    return build_spec(found.config(heads_for(world_size)), variant, found.freeze, found.lora)


@dataclass(frozen=True)
class Sweep:
    """A pool, a folder where references are kept once trained, and how they are unless another recipe is given."""

    pool: Pool
    folder: Path
    recipe: Recipe = field(default_factory=Recipe)

    def parity(
        self, variant: str, plan: Plan, recipe: Recipe | None = None, *, engine: str | None = None
    ) -> ParityReport:
        """``testing.parity`` of the variant of that name (in halves the smooth one); WorkerError where a rank fails."""

        recipe = recipe or self.recipe

        def reference(draw: int, exact: bool) -> Path:
            return self._reference(variant, plan, replace(recipe, seed=recipe.seed + draw), exact=exact)

        return decided(reference, lambda path: parity_with(path, plan, self.pool, engine=engine), plan.precision)

    def _reference(self, variant: str, plan: Plan, recipe: Recipe, *, exact: bool) -> Path:
        heads = heads_for(plan.world_size)
        clip = recipe.max_grad_norm
        name = f"{variant}-{heads}-{plan.global_batch_size}x{plan.seq_len}-{clip}-{recipe.num_steps}-{recipe.seed}"
        path = self.folder / f"{name}-{plan.precision}{'-exact' if exact else ''}.pt"
        if not path.exists():
            model = Variant.named(variant).model(heads, recipe.seed, smooth=plan.precision != "fp32")
            reference = train_reference(
                model, plan.global_batch_size, plan.seq_len, recipe, plan.precision, exact=exact
            )
            reference.save(path)
        return path
