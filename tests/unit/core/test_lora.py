"""LoRA by name, without torch: what is written, what gets adapters, how these are cut."""

from __future__ import annotations

import pytest

from galvatron.core.errors import ConfigError
from galvatron.core.job import Job
from galvatron.core.known import known_families
from galvatron.core.lora import Lora, with_adapters
from galvatron.estimate import adapted_spec, model_spec

JOB = {
    "model": {"path": "x", "weights": True},
    "data": {"source": "x"},
    "train": {"global_batch_size": 1, "seq_len": 1, "num_steps": 1},
}


def test_settings_are_those_of_peft() -> None:
    text = "r=16, lora_alpha=32, target_modules=q_proj+v_proj, lora_dropout=0.05, use_rslora=true"
    asked = Lora.parse(text)
    assert asked == Lora(r=16, lora_alpha=32, target_modules=("q_proj", "v_proj"), lora_dropout=0.05, use_rslora=True)
    assert Lora.parse("r=4") == Lora(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0)
    assert Lora.parse(str(asked)) == asked
    assert Job.model_validate(JOB).adapted(text).model.lora == asked


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rank=16", "--lora takes NAME=VALUE, once for a name, got 'rank=16'; names are r, lora_alpha"),
        ("lora_alfa=16", "did you mean 'lora_alpha'"),
        ("r=4,r=8", "once for a name, got 'r=8'; names are"),
        ("r=0", "r: must be at least 1"),
        ("r=four", "r: must be a valid integer"),
        ("lora_dropout=1.0", "lora_dropout: must be less than 1"),
        ("target_modules=", "target_modules names no module"),
        ("", "got ''"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Lora.parse(text)
    assert complaint in str(refused.value)


def test_adapters_need_weights_to_adapt() -> None:
    job = Job.model_validate({**JOB, "model": {"path": "x"}})
    with pytest.raises(ConfigError, match="lora adapts trained weights; set weights = true"):
        job.adapted("r=4")


def test_what_has_no_adapters_is_named() -> None:
    family = known_families()["llama"].family
    for target in ("lm_head", "embed_tokens", "experts", "proj"):
        with pytest.raises(ConfigError, match=rf"'{target}' is no linear .* choose among self_attn\.q_proj.* \(embedd"):
            Lora(target_modules=(target,)).targets(family)
    assert Lora(target_modules=("v_proj", "mlp.down_proj")).targets(family) == ("self_attn.v_proj", "mlp.down_proj")
    with pytest.raises(ConfigError, match=r"it is not known which linears of .* can have adapters; profile the model"):
        adapted_spec(model_spec("swin-h").model_copy(update={"family": "unheard-of"}), Lora())


def test_a_frozen_model_with_adapters_is_planned() -> None:
    whole = model_spec("llama3.1-8b")
    spec = with_adapters(whole, known_families()["llama"].family, Lora(r=16))
    (kind,) = spec.layers
    found = {p.name: p for p in kind.parameters if p.trainable}
    assert len(found) == 14
    down, up = (found[f"mlp.down_proj.lora_{letter}.default.weight"] for letter in "AB")
    assert (down.shape, up.shape) == ((16, 14336), (4096, 16))
    assert (down.local_shape(4), up.local_shape(4)) == ((16, 3584), (4096, 16))
    key = found["self_attn.k_proj.lora_B.default.weight"]
    assert (key.local_shape(8), key.local_shape(16)) == ((128, 16), (1024, 16)), "8 kv heads: 16 ranks keep all"
    trained = sum(kind.count * p.shape[0] * p.shape[1] for p in found.values())
    assert trained == 41_943_040, "as peft's print_trainable_parameters says"
    assert spec.num_parameters == whole.num_parameters + trained
    assert not any(p.trainable for p in (*spec.embedding.parameters, *spec.head.parameters))
    assert not spec.trains_before(0)
    assert spec.trains_before(1)
