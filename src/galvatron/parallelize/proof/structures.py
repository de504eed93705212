"""Which structures of models are proved right, each once a process, and which strategies are not."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import transformers
from transformers import PretrainedConfig

from galvatron.core.errors import ConfigError
from galvatron.core.known import known_family
from galvatron.core.model import ModelSpec
from galvatron.models import Family, family_of, spec_of, structure_key, task_of, twin_config, twin_model
from galvatron.models.failures import told
from galvatron.models.recognise import recognise

from .truth import Truth, is_other
from .ways import TP, alone, between_threads, in_stages

KV_HEADS = (2, 1)
_proofs: dict[str, Proof] = {}


@dataclass(frozen=True)
class Proof:
    """What was found wrong, a sentence each; None is right.

    Attributes:
        whole: of the model driven by galvatron: without it nothing runs.
        tp: of layers that are cut.
        pp: of the model driven in stages, as many as it has layers.
    """

    whole: str | None = None
    tp: str | None = None
    pp: str | None = None


def prove(config: PretrainedConfig) -> Proof:
    """Run the twins of ``config``, once a structure and process; takes a second or two."""
    key = structure_key(config)
    if key not in _proofs:
        family = family_of(config)
        try:
            _proofs[key] = _proof(config, family)
        except Exception as failure:  # of any kind: foreign models are built and described
            _proofs[key] = Proof(whole=told(failure))
    return _proofs[key]


def proved_structures(config: PretrainedConfig) -> dict[str, str]:
    """The structures of a type's ``config``, as it is and one flag changed at a time, that are right; in words."""
    found: dict[str, str] = {}
    own = recognise(config)
    for name, usual in {"": None, **config.to_dict()}.items():
        changed = copy.deepcopy(config)
        if name:
            if not isinstance(usual, bool):
                continue
            setattr(changed, name, not usual)
        key = structure_key(changed)
        try:
            # data hold one family for all that is proved by its cuts
            right = key in found or (recognise(changed) == own and prove(changed) == Proof())
        except ConfigError:
            right = False
        if right:
            found.setdefault(key, f"{name}={str(not usual).lower()}" if name else "as it is")
    return found


def is_known(config: PretrainedConfig) -> bool:
    """Whether this structure was proved with this version of transformers, as the data that ship say."""
    known = known_family(config.model_type, task_of(config))
    return (
        known is not None and known.transformers == transformers.__version__ and structure_key(config) in known.proved
    )


def refuse_unproved(config: PretrainedConfig, *, uses_tp: bool, uses_pp: bool) -> None:
    """Raise ConfigError if a twin of ``config`` is not computed right, or not in stages or cut if it shall be."""
    if is_known(config):
        return
    proof = prove(config)
    if proof.whole is not None:
        raise ConfigError(
            f"model_type={config.model_type!r} is not computed right by galvatron, as a tiny twin of it shows: "
            f"{proof.whole}; train another model"
        )
    if uses_pp and proof.pp is not None:
        raise ConfigError(
            f"stages of model_type={config.model_type!r} do not compute what all of it does, as a tiny twin of it "
            f"shows: {proof.pp}; use plans of pp 1"
        )
    if uses_tp and proof.tp is not None:
        raise ConfigError(
            f"layers of model_type={config.model_type!r} are not cut right by tensor parallelism, as a tiny twin of it "
            f"shows: {proof.tp}; use plans of tp 1"
        )


def _proof(config: PretrainedConfig, family: Family) -> Proof:
    whole, tp, pp, compared = None, None if family.is_cuttable else "no rule fits its linears", None, False
    twins = {_text(twin): twin for kv_heads in KV_HEADS for twin in [twin_config(config, kv_heads)]}
    for twin in twins.values():
        truth = Truth.of(twin)
        if whole is None and pp is None:
            whole = truth.problem() or (None if family.asks_for_attention else truth.by_default(twin, family))
            pp = truth.against(in_stages, twin, family) if whole is None else None
        if pp is not None:
            whole = whole or truth.against(alone, twin, family)
        if tp is None and whole is None and _is_allowed(spec_of(twin_model(twin), family=family)):
            tp, compared = truth.against(between_threads, twin, family), True
    if any(found is not None and is_other(found) for found in (whole, pp, tp)) and truth.varies(twin):
        whole = "it draws random numbers that are no dropout, so that no two runs of it are alike"
    if tp is None and not compared:
        tp = "its cuts divide by no number"
    return Proof(whole, tp, pp)


def _text(config: PretrainedConfig) -> str:
    text: str = config.to_json_string(use_diff=False)
    return text


def _is_allowed(spec: ModelSpec) -> bool:
    """Whether the rules let a plan cut layers between TP ranks."""
    cuts = [parameter.cut for kind in spec.layers for parameter in kind.parameters if parameter.cut is not None]
    return all(cut.misfit(TP) is None for cut in cuts)
