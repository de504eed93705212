"""What transformers says of a model that was exported."""

from __future__ import annotations

from pathlib import Path

import torch

from galvatron.core.job import Job
from galvatron.models import auto_class, class_names, load_config, task_of
from galvatron.train import load_dataset


def evaluated_by_transformers(exported: Path, job: Job, folder: Path) -> tuple[float, float]:
    """The loss and accuracy of what a job evaluates (its validation source, if it has one) by the exported model."""
    config = load_config(exported)
    model = auto_class(config).from_pretrained(exported).eval()
    made = load_dataset(job.data, job.train, folder, task=task_of(config), class_names=class_names(config))
    dataset = made.validation or made
    batches = [dataset.eval_batch(i) for i in range(min(job.train.eval_batches, dataset.num_eval_batches))]
    labels = torch.cat([batch.pop("labels") for batch in batches])
    with torch.no_grad():
        logits = torch.cat([model(**batch).logits for batch in batches])
    right = ((logits.argmax(-1) == labels).sum() / (labels != -100).sum()).item()
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()).item(), right
