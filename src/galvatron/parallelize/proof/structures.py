"""Which structures of models are proved right, each once a process, and which strategies are not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import transformers
from transformers import PretrainedConfig

from galvatron.core.errors import ConfigError
from galvatron.core.known import known_family
from galvatron.core.model import ModelSpec
from galvatron.models import Family, family_of, spec_of, structure_key, task_of, twin_config, twin_model
from galvatron.models.recognise import recognise

from .finding import Finding
from .truth import Truth
from .ways import TP, alone, between_threads, in_stages

KV_HEADS = (2, 1)
_proofs: dict[str, Proof] = {}


@dataclass(frozen=True)
class Proof:
    """What was found wrong; None is right.

    Attributes:
        whole: of the model driven by galvatron: without it nothing runs.
        tp: of layers that are cut.
        pp: of the model driven in stages, as many as it has layers.
    """

    whole: Finding | None = None
    tp: Finding | None = None
    pp: Finding | None = None


def prove(config: PretrainedConfig) -> Proof:
    """Run the twins of ``config``, once a structure and process; takes a second or two."""
    key = structure_key(config)
    if key not in _proofs:
        family = family_of(config)
        try:
            _proofs[key] = _proof(config, family)
        except Exception as failure:  # of any kind: foreign models are built and described
            _proofs[key] = Proof(whole=Finding.of(failure))
    return _proofs[key]


def proved_structures(config: PretrainedConfig) -> dict[str, str]:
    """The structures of a type's ``config``, as it is and one flag changed at a time, that are right; in words."""
    own, found = recognise(config), {}
    for words, changed in _changed(config):
        key = structure_key(changed)
        if key not in found and _is_right(changed, own):
            found[key] = words
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
    proof, named = prove(config), f"model_type={config.model_type!r}"
    for is_used, found, wrong, remedy in (
        (True, proof.whole, f"{named} is not computed right by galvatron", "train another model"),
        (uses_pp, proof.pp, f"stages of {named} do not compute what all of it does", "use plans of pp 1"),
        (uses_tp, proof.tp, f"layers of {named} are not cut right by tensor parallelism", "use plans of tp 1"),
    ):
        if is_used and found is not None:
            raise ConfigError(f"{wrong}, as a tiny twin of it shows: {found}; {remedy}")


def _changed(config: PretrainedConfig) -> Iterator[tuple[str, PretrainedConfig]]:
    yield "as it is", config
    for name, usual in config.to_dict().items():
        if isinstance(usual, bool):
            changed = copy.deepcopy(config)
            setattr(changed, name, not usual)
            yield f"{name}={str(not usual).lower()}", changed


def _is_right(config: PretrainedConfig, own: Family) -> bool:
    try:  # data hold one family for all that is proved by its cuts
        return recognise(config) == own and prove(config) == Proof()
    except ConfigError:
        return False


def _proof(config: PretrainedConfig, family: Family) -> Proof:
    whole, pp = None, None
    tp = None if family.is_cuttable else Finding("unfit", "no rule fits its linears")
    compared = False
    for twin in _twins(config):
        truth = Truth.of(twin)
        if whole is None and pp is None:
            whole = truth.problem() or (None if family.asks_for_attention else truth.by_default(twin))
            pp = truth.against(in_stages, twin, family) if whole is None else None
        if pp is not None:
            whole = whole or truth.against(alone, twin, family)
        if tp is None and whole is None and _is_allowed(spec_of(twin_model(twin), family=family)):
            tp, compared = truth.against(between_threads, twin, family), True
    if any(found is not None and found.kind == "differs" for found in (whole, pp, tp)) and truth.varies(twin):
        whole = Finding("unfit", "it draws random numbers that are no dropout, so that no two runs of it are alike")
    if tp is None and not compared:
        tp = Finding("unfit", "its cuts divide by no number")
    return Proof(whole, tp, pp)


def _twins(config: PretrainedConfig) -> list[PretrainedConfig]:
    """With several heads of keys and values and with one; once, where none are counted."""
    twins = (twin_config(config, kv_heads) for kv_heads in KV_HEADS)
    return list({twin.to_json_string(use_diff=False): twin for twin in twins}.values())


def _is_allowed(spec: ModelSpec) -> bool:
    """Whether the rules let a plan cut layers between TP ranks."""
    cuts = [parameter.cut for kind in spec.layers for parameter in kind.parameters if parameter.cut is not None]
    return all(cut.misfit(TP) is None for cut in cuts)
