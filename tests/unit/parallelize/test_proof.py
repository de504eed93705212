"""Unknown types are recognised and proved on a twin: what is right passes, what is planted wrong is named."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig

from galvatron.core.errors import ConfigError, UnfitError
from galvatron.core.family import Family
from galvatron.models import family_of
from galvatron.models.failures import said
from galvatron.models.heads import heads_in
from galvatron.parallelize.proof import Finding, Proof, prove, refuse_unproved, structures
from galvatron.parallelize.proof.truth import Truth
from galvatron.testing.models import tiny_config

SAMPLE = ("gemma2", "phi3", "olmo2", "gpt_neox", "gpt_oss")


@pytest.mark.parametrize("family", SAMPLE)
def test_gradients_of_a_recognised_type_are_those_of_its_twin(family: str) -> None:
    assert prove(tiny_config(family)) == Proof()


def test_layouts_of_fused_matrices_are_found() -> None:
    attention, mlp = family_of(tiny_config("phi3")).stacks[0].regions
    assert attention.columns == {"self_attn.qkv_proj": ("heads", "kv_heads", "kv_heads")}
    assert mlp.columns == {"mlp.gate_up_proj": ("ffn", "ffn")}
    assert family_of(tiny_config("gpt2")).stacks[0].regions[0].columns == {"attn.c_attn": ("heads", "heads", "heads")}
    assert family_of(tiny_config("gpt_neox")).stacks[0].regions[0].columns == {"attention.query_key_value": ("heads",)}
    assert family_of(tiny_config("olmo2")).stacks[0].regions[0].wide_norms.keys() == {
        "self_attn.q_norm",
        "self_attn.k_norm",
    }
    assert family_of(tiny_config("gemma2")).logits.soft_cap == "final_logit_softcapping"
    assert family_of(tiny_config("granite")).logits.divide_by == "logits_scaling"


def _planted(family: Family, monkeypatch: pytest.MonkeyPatch) -> Proof:
    monkeypatch.setattr(structures, "family_of", lambda config: family)
    monkeypatch.setattr(structures, "_proofs", {})
    return prove(tiny_config(family.model_type))


def test_a_wrong_layout_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of(tiny_config("phi3"))
    attention, mlp = family.stacks[0].regions
    wrong = mlp.model_copy(update={"columns": {"mlp.gate_up_proj": ("ffn",)}})  # halves of one, not of both
    cut = family.stacks[0].model_copy(update={"regions": (attention, wrong)})
    found = _planted(family.model_copy(update={"stacks": (cut,)}), monkeypatch)
    assert found.whole is None
    assert found.tp is not None
    assert found.tp.kind == "differs"
    assert found.tp.detail.startswith("the loss is")


def test_lost_soft_caps_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of(tiny_config("gemma2"))
    found = _planted(family.model_copy(update={"logits": type(family.logits)()}), monkeypatch)
    assert found.whole is not None
    monkeypatch.setattr(structures, "prove", lambda config: found)
    monkeypatch.setattr(structures, "is_known", lambda config: False)
    with pytest.raises(
        ConfigError, match="is not computed right by galvatron, as a tiny twin of it shows: the loss is"
    ):
        refuse_unproved(tiny_config("gemma2"), uses_tp=False, uses_pp=False)


def test_what_cannot_be_compared_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structures, "_is_allowed", lambda spec: False)
    assert _planted(family_of(tiny_config("llama")), monkeypatch).tp == Finding("unfit", "its cuts divide by no number")
    nothing = Truth(1.0, {})
    assert nothing.problem() == Finding("unfit", "it has no gradients")
    assert Truth(float("nan"), {}).problem() == Finding("unfit", "its loss or gradients are not finite")


def test_an_eager_attention_unlike_that_by_default_is_named() -> None:
    """Falcon's adds its biases of distance twice (transformers 5.23), by SDPA once."""
    assert prove(AutoConfig.for_model("falcon")).whole is None
    whole = prove(AutoConfig.for_model("falcon", alibi=True)).whole
    assert whole is not None
    assert whole.kind == "differs"
    assert str(whole).startswith("its eager attention is not its attention by SDPA: the loss is ")


def test_a_gradient_that_the_whole_has_not_is_named() -> None:
    one = torch.ones(1)
    found = Truth(1.0, {"a": one}).against(lambda *_: (1.0, {"a": one, "b": one}), None, None)  # type: ignore[arg-type]
    assert found == Finding("differs", detail="b has a gradient, which it has not in the whole twin")


@pytest.mark.parametrize(
    ("failure", "finding", "sentence"),
    [
        (
            ValueError("the loss is odd: the gradient of it"),
            Finding("fails", detail="ValueError (the loss is odd: the gradient of it)"),
            "it fails with ValueError (the loss is odd: the gradient of it)",
        ),
        (ConfigError("the loss is 1; give 2"), Finding("unfit", "the loss is 1; give 2"), "the loss is 1; give 2"),
        (UnfitError("x", "has a; b: c (d)", "mend it", "e; f"), Finding("unfit", "has a; b: c (d)", "e; f"), None),
    ],
)
def test_an_error_is_no_other_result_whatever_it_says(
    failure: Exception, finding: Finding, sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> tuple[float, dict[str, torch.Tensor]]:
        raise failure

    monkeypatch.setattr(structures, "between_threads", fails)
    monkeypatch.setattr(Truth, "varies", lambda *_: True)  # what differs would be put down to that
    found = _planted(family_of(tiny_config("llama")), monkeypatch)
    assert found == Proof(tp=finding)
    assert str(found.tp) == (sentence or "has a; b: c (d) (e; f)")


def test_what_a_type_is_unfit_by_is_told_in_other_processes_too() -> None:
    told = pickle.loads(pickle.dumps(UnfitError("x", "has no a", "choose another", "b; c")))
    assert (str(told), told.rule, told.detail) == ("model_type='x' has no a (b; c); choose another", "has no a", "b; c")


def test_what_is_no_such_chain_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="no stack of equal layers"):
        family_of(AutoConfig.for_model("albert"))
    relative = AutoConfig.for_model("deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"])
    with pytest.raises(ConfigError, match=r"multiplies by deberta.encoder.rel_embeddings.weight outside of the module"):
        family_of(relative)  # whose layers run a linear twice


def _failing(work: Callable[[], object]) -> Exception:
    try:
        work()
    except Exception as failure:
        return failure
    raise AssertionError


def test_an_error_of_our_own_says_where_not_what() -> None:
    ours = said(_failing(lambda: heads_in(None, None)))  # type: ignore[arg-type]
    assert ours == "AttributeError in galvatron.models.heads, which knows no such model"
    foreign = said(_failing(lambda: torch.nn.Linear(2, 2)(torch.ones(3))))
    assert foreign.startswith("RuntimeError (")
    assert said(ConfigError("a=1 must be 2; give 2")) == "a=1 must be 2; give 2"
