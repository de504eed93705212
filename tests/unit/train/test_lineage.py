from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from train_fakes import lineage_for, section
from transformers import CLIPConfig, LlamaConfig

from galvatron.core.errors import CheckpointError
from galvatron.core.job import DataSection, Job, ModelSection
from galvatron.train.lineage import Lineage, check_goes_on, notable_changes

WHERE = Path("step-000500")
CONFIG = LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, attention_dropout=0.1)
JOB = Job(model=ModelSection(path="m"), data=DataSection(source="text"), train=section(num_steps=1000))


def lineage(config: LlamaConfig = CONFIG, **sections: dict[str, Any]) -> Lineage:
    """The lineage of JOB with some settings of its sections changed."""
    changed = {name: getattr(JOB, name).model_copy(update=values) for name, values in sections.items()}
    return Lineage.of_job(JOB.model_copy(update=changed), config)


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**CONFIG.to_dict(), **changes})


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (lineage(train={"seed": 4}), "with seed=3 but the job has seed=4"),
        (lineage(train={"seq_len": 16}), "with seq_len=8 but the job has seq_len=16"),
        (lineage(train={"global_batch_size": 2}), "with global_batch_size=4 but"),
        (lineage(data={"eval_fraction": 0.1}), r"with eval_fraction=0\.02 but the job has eval_fraction=0\.1"),
        (lineage(data={"text_field": "body"}), "with text_field=text but the job has text_field=body"),
        (lineage(data={"split": "test"}), "with split=train but"),
        (lineage(data={"tokenizer": "gpt2"}), "with tokenizer=bytes but"),
        (lineage(model={"freeze": ("*norm*",)}), r"with freeze=\(\) but the job has freeze=\('\*norm\*',\)"),
        (lineage(llama(attention_dropout=0.0)), r"with attention_dropout=0\.1 but"),
        (lineage(llama(rms_norm_eps=1e-5)), "with rms_norm_eps=1e-06 but the job has rms_norm_eps=1e-05"),
        (lineage(llama(hidden_act="gelu")), "with hidden_act=silu but"),
        (lineage(llama(pad_token_id=2)), "with pad_token_id=None but the job has pad_token_id=2"),
        (
            lineage(llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
            r"with rope_parameters=\{'rope_theta': 10000\.0.*.*'rope_theta': 500000\.0",
        ),
    ],
)
def test_what_would_not_go_on_is_refused_by_name(now: Lineage, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        check_goes_on(lineage(), now, WHERE)


def test_configs_within_a_config_are_compared_as_it_is() -> None:
    def clip(**text: Any) -> Any:
        return CLIPConfig(text_config={"hidden_size": 32, **text})

    as_built = clip()
    as_built.text_config.dtype = "float32"  # which transformers writes into a config that it builds a model of
    check_goes_on(lineage(as_built), lineage(clip()), WHERE)
    with pytest.raises(
        CheckpointError, match=r"with text_config\.attention_dropout=0\.0 but the job has text_config\."
    ):
        check_goes_on(lineage(as_built), lineage(clip(attention_dropout=0.5)), WHERE)


def test_all_differences_are_named_at_once() -> None:
    now = lineage(llama(hidden_act="gelu"), train={"seed": 4}, data={"eval_fraction": 0.1})
    with pytest.raises(CheckpointError, match=r"seed=4, eval_fraction=0\.1, hidden_act=gelu.*set these back"):
        check_goes_on(lineage(), now, WHERE)


@pytest.mark.parametrize(
    "now",
    [
        lineage(),
        lineage(train={"lr": 1e-3, "num_steps": 2000, "weight_decay": 0.0, "save_every": 3, "precision": "bf16"}),
        lineage(model={"path": "elsewhere", "weights": True}),
        lineage(data={"source": "/moved/text"}),
        lineage(llama(initializer_range=0.5, use_cache=False, dtype="bfloat16", architectures=["A"])),
    ],
)
def test_what_does_not_decide_samples_or_model_is_not_refused(now: Lineage) -> None:
    check_goes_on(lineage(), now, WHERE)


def test_a_tokenizer_may_move() -> None:
    here, there = (lineage(data={"tokenizer": f"{place}/tokens"}) for place in ("/a", "/b"))
    check_goes_on(here, there, WHERE)


def test_tokens_are_compared_once_both_sides_know_them() -> None:
    before, now = (lineage().model_copy(update={"tokens_sha256": digest}) for digest in ("aa", "bb"))
    with pytest.raises(CheckpointError, match=r"other tokens \(SHA-256 aa, now bb\)"):
        check_goes_on(before, now, WHERE)
    check_goes_on(before, lineage(), WHERE)


def test_the_learning_rate_that_follows_is_said() -> None:
    now = lineage(train={"num_steps": 2000, "lr": 0.1, "lr_schedule": "linear"})
    assert notable_changes(lineage(), now, 500) == [
        "lr was 0.05 and is 0.1, lr_schedule was cosine and is linear, num_steps was 1000 and is 2000: "
        "the learning rate of step 501 is 0.075 in place of 0.025"
    ]


def test_other_settings_and_versions_are_said_and_outputs_are_not() -> None:
    now = lineage(train={"weight_decay": 0.0, "betas": (0.8, 0.9), "save_every": 7, "keep_checkpoints": 1})
    versions = {**now.versions, "torch": "2.11.0"}
    assert notable_changes(lineage().model_copy(update={"versions": versions}), now, 500) == [
        "betas was (0.9, 0.95) and is (0.8, 0.9), weight_decay was 0.1 and is 0.0",
        f"torch was 2.11.0 and is {now.versions['torch']}: numbers go on to rounding, not bit for bit",
    ]
    assert notable_changes(lineage(), lineage(), 500) == []


def test_a_setting_that_another_transformers_lacks_is_said_but_one_that_is_missing_is_refused() -> None:
    config = dict(lineage().config)
    del config["mlp_bias"]
    lacking = lineage().model_copy(update={"config": {**config}})
    with pytest.raises(CheckpointError, match="mlp_bias=None but the job has mlp_bias=False"):
        check_goes_on(lacking, lineage(), WHERE)
    older = lacking.model_copy(update={"versions": {**lacking.versions, "transformers": "4.0.0"}})
    check_goes_on(older, lineage(), WHERE)
    assert "mlp_bias was None and is False" in notable_changes(older, lineage(), 0)[-1]


def test_the_file_keeps_defaults(tmp_path: Path) -> None:
    lineage().save(tmp_path / "run.json")
    assert Lineage.load(tmp_path / "run.json") == lineage()
    text = json.loads((tmp_path / "run.json").read_text())
    assert text["train"]["weight_decay"] == 0.1
    assert text["config"]["rms_norm_eps"] == 1e-6
    assert text["versions"].keys() == {"galvatron", "torch", "transformers"}


def test_a_run_without_a_job_is_compared_by_what_it_has() -> None:
    check_goes_on(lineage_for(section()), lineage_for(section(lr=1.0)), WHERE)
    with pytest.raises(CheckpointError, match="eval_fraction"):
        check_goes_on(lineage_for(section()), lineage_for(section(), eval_fraction=0.5), WHERE)
