"""The last step of a run: the trained model as a Hugging Face directory, and a few words from it.

Takes a run directory with a checkpoint; uses nothing of Galvatron's runtime to generate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galvatron.core.errors import ConfigError
from galvatron.core.tasks import Task

from .console import heading, say

if TYPE_CHECKING:
    from galvatron.core.job import Job

    from .rundir import RunDirectory


GENERATE: tuple[Task, ...] = ("causal_lm", "seq2seq_lm")


def check_generates(job: Job, task: Task) -> None:
    """Raise ConfigError if the job asks for text of a model that gives none."""
    if job.generate is not None and task not in GENERATE:
        raise ConfigError(
            f"[generate] is for {' and '.join(GENERATE)}, and the model is for {task}; remove the section"
        )


def generate(job: Job, run: RunDirectory) -> None:
    """Export the latest checkpoint, once, and continue or answer the job's prompt with ``transformers``."""
    import torch
    from transformers.utils import logging

    from galvatron.models import auto_class, load_config
    from galvatron.train import checkpoint_to_hf, find_checkpoint, load_tokenizer

    section = job.generate
    assert section is not None
    heading("Generate")
    checkpoint = find_checkpoint(run.checkpoints, "latest")
    directory = run.exported / checkpoint.name
    tokenizer = load_tokenizer(job.data.tokenizer, job.data.chat_template)
    if not directory.exists():
        checkpoint_to_hf(checkpoint, directory, tokenizer=tokenizer.for_transformers())
    say(f"{directory} loads with from_pretrained; it goes on from the prompt:")
    logging.disable_progress_bar()
    model: Any = auto_class(load_config(directory)).from_pretrained(directory)
    prompt = torch.as_tensor(tokenizer.encode_batch([section.prompt])[0].copy()).long()[None]
    if model.config.is_encoder_decoder:  # an encoder reads the end of a text, which its decoder answers
        prompt = torch.cat([prompt, torch.tensor([[tokenizer.end_of_text]])], dim=1)
    sampling = {"do_sample": True, "temperature": section.temperature} if section.temperature else {"do_sample": False}
    torch.manual_seed(job.train.seed)
    with torch.inference_mode():
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=section.max_new_tokens,
            **sampling,
            pad_token_id=tokenizer.end_of_text,
            eos_token_id=tokenizer.end_of_text,
        )
    say(tokenizer.decode(ids[0].tolist()))
