"""A job starts from a checkpoint of another task: what its own task adds is new, what lacks beside that is damage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, PreTrainedModel

from galvatron.cli.data import config_of_job
from galvatron.cli.weights import first_weights
from galvatron.core.errors import CheckpointError, ConfigError
from galvatron.core.job import DataSection, Job, ModelSection, TrainSection
from galvatron.core.lora import Lora
from galvatron.models import meta_model
from galvatron.parallelize.state.weights import check_names

CONFIG = BertConfig(
    vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=3
)
POOLER = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
HEAD = {"classifier.weight", "classifier.bias"}


def job_from(folder: Path, model: PreTrainedModel, num_labels: int = 3) -> Job:
    model.save_pretrained(folder)
    section = ModelSection(path=str(folder), weights=True, task="text_classification", num_labels=num_labels)
    train = TrainSection(global_batch_size=2, seq_len=8, num_steps=1)
    return Job(model=section, data=DataSection(source="x"), train=train)


@pytest.mark.parametrize(
    ("base", "num_labels", "new"),
    [
        (BertForMaskedLM, 3, POOLER | HEAD),
        (BertModel, 3, HEAD),
        (BertForSequenceClassification, 5, HEAD),
        (BertForSequenceClassification, 3, set()),
    ],
)
@pytest.mark.filterwarnings("ignore:.*the model lacks and that are left out")
def test_what_a_task_adds_is_new(tmp_path: Path, base: type[PreTrainedModel], num_labels: int, new: set[str]) -> None:
    model = base(CONFIG)
    job = job_from(tmp_path, model, num_labels)
    weights = first_weights(job, config_of_job(job))
    assert weights.new == new
    check_names(weights, meta_model(config_of_job(job)), {})
    query = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(weights.read(f"bert.{query}", (0, 0), (8, 8)), model.base_model.get_parameter(query))
    if new:
        assert weights.shape("classifier.weight") == (num_labels, 8)
        assert 0 < weights.read("classifier.weight", (0, 0), (num_labels, 8)).std() < 0.1
        assert not weights.read("classifier.bias", (0,), (num_labels,)).any()


def test_what_lacks_beside_is_damage(tmp_path: Path) -> None:
    job = job_from(tmp_path, BertForMaskedLM(CONFIG))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bert.encoder.layer.0.output.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = config_of_job(job)
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's .* parameters: bert\.encoder\.layer\.0\.output"):
        check_names(first_weights(job, config), meta_model(config), {})


def test_adapters_do_not_train_a_new_head(tmp_path: Path) -> None:
    job = job_from(tmp_path, BertForMaskedLM(CONFIG))
    job = job.model_copy(update={"model": job.model.model_copy(update={"lora": Lora()})})
    with pytest.raises(ConfigError, match=r"has no bert\.pooler.* and lora would leave it as it begins"):
        first_weights(job, config_of_job(job))
