"""The last step of a run: the trained model as a Hugging Face directory, and a few words from it.

Takes a run directory with a checkpoint; uses nothing of Galvatron's runtime to generate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .console import heading, say

if TYPE_CHECKING:
    from galvatron.core.job import Job

    from .rundir import RunDirectory


def generate(job: Job, run: RunDirectory) -> None:
    """Export the latest checkpoint, once, and continue the job's prompt with ``transformers``."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from galvatron.train import checkpoint_to_hf, find_checkpoint, load_tokenizer

    section = job.generate
    assert section is not None
    heading("Generate")
    checkpoint = find_checkpoint(run.checkpoints, "latest")
    directory = run.exported / checkpoint.name
    tokenizer = load_tokenizer(job.data.tokenizer, job.data.chat_template)
    if not directory.exists():
        checkpoint_to_hf(checkpoint, directory, tokenizer=tokenizer.for_transformers())
    say(f"{directory} loads with from_pretrained; it continues the prompt:")
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    prompt = torch.as_tensor(tokenizer.encode_batch([section.prompt])[0].copy()).long()[None]
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
