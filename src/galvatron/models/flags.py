"""Flags of a type's config: which add or remove parameters, and which change more than that.

Takes a type's config and its family; builds a twin with each flag turned over.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from galvatron.core.errors import ConfigError
from galvatron.core.family import Family
from galvatron.core.model import ParameterSpec

from .by_formula import TIES, is_always_tied, parts_of, sizes_in
from .family import family_of
from .load import meta_model
from .spec import spec_of
from .twin import twin_config

NOT_STRUCTURAL = (
    "use_cache",
    "output_attentions",
    "output_router_logits",
    "output_hidden_states",
    "return_dict",
    "is_encoder_decoder",
    "tie_word_embeddings",
)


def flags_of(config: PretrainedConfig, family: Family) -> tuple[dict[str, bool], dict[str, bool | int | list[int]]]:
    """Flags that add or remove parameters, at their defaults; and values that change more, which stay as they are."""
    adding: dict[str, bool] = {}
    fixed: dict[str, bool | int | list[int]] = {}
    twin = twin_config(config)
    before = _by_name(twin, family)
    flags = ((prefix, part, name) for prefix, part in parts_of(twin) for name in part.to_dict())
    for prefix, part, own in flags:
        name, usual = f"{prefix}{own}", part.to_dict()[own]
        may_untie = family.ends == "whole" and not prefix and not is_always_tied(config)
        if name in sizes_in(twin):
            continue
        if own in NOT_STRUCTURAL and not (own == TIES and may_untie):
            continue
        if not (isinstance(usual, bool) or usual == [] or (usual == 1 and isinstance(usual, int))):
            continue
        setattr(part, own, not usual if isinstance(usual, bool) else [0] if usual == [] else 2)
        try:
            after = _by_name(twin, family)
            own_family = family_of(twin)
            same_family = own_family.model_copy(update={"stacks": family.stacks}) == family
            same_family &= _by_name(twin, own_family) == after  # other regions may cut alike
            if after != before:
                shared = after.keys() & before.keys()
                same = same_family and isinstance(usual, bool) and all(after[key] == before[key] for key in shared)
                (adding if same else fixed)[name] = usual
            elif not same_family:
                fixed[name] = usual
        except (ConfigError, AttributeError):  # a module that the family names is gone
            fixed[name] = usual
        setattr(part, own, usual)
    return adding, fixed


def _by_name(twin: PretrainedConfig, family: Family) -> dict[str, ParameterSpec]:
    spec = spec_of(meta_model(twin), "x", family)
    ends = {p.name: p for unit in (spec.embedding, spec.head) for p in unit.parameters}
    return ends | {f"{at}.{p.name}": p for at, kind in enumerate(spec.layers) for p in kind.parameters}
