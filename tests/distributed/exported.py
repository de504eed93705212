"""What transformers says of a model that was exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from galvatron.core.job import Job
from galvatron.models import auto_class, load_config, task_of
from galvatron.train import load_dataset


def evaluated_by_transformers(exported: Path, job: Job, folder: Path) -> tuple[float, float]:
    """The loss and accuracy of what a job evaluates (its validation source, if it has one) by the exported model."""
    config = load_config(exported)
    model = auto_class(config).from_pretrained(exported).eval()
    made = load_dataset(job.data, job.train, folder, config=config)
    dataset = made.validation or made
    batches = [dataset.eval_batch(i) for i in range(min(job.train.eval_batches, dataset.num_eval_batches))]
    with torch.no_grad():
        if task_of(config) == "contrast":
            return of_pairs([model(**batch, return_loss=True) for batch in batches])
        labels = torch.cat([batch.pop("labels") for batch in batches])
        logits = torch.cat([model(**batch).logits for batch in batches])
    right = ((logits.argmax(-1) == labels).sum() / (labels != -100).sum()).item()
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()).item(), right


def of_pairs(outputs: list[Any]) -> tuple[float, float]:
    """The mean of the losses, and how often nothing goes better with a text, or an image, than its own."""
    scores = [both for output in outputs for both in (output.logits_per_text, output.logits_per_image)]
    right = [(each.diagonal().unsqueeze(1) >= each).all(dim=1) for each in scores]
    return torch.stack([output.loss for output in outputs]).mean().item(), torch.cat(right).float().mean().item()
