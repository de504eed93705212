"""What the numbers of a run depend on beside its plan, and whether another run may go on from its checkpoints.

Takes settings, a model's configuration and a dataset; gives ``run.json`` and one sentence a difference.  Knows
nothing of weights: their names and shapes are the checkpoint's own check.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
import transformers
from transformers import PretrainedConfig

from galvatron.core.errors import CheckpointError, GalvatronError
from galvatron.core.job import DataSection, Job, ModelSection, TrainSection
from galvatron.core.records import FileRecord, dump_json
from galvatron.core.version import __version__

from .data import Dataset
from .optimizer import lr_at

RUN_FILE = "run.json"
_SAMPLES = ("seed", "global_batch_size", "seq_len")
_SAID = (
    *("split", "records", "text_field", "messages_field", "prompt_field", "completion_field", "separate_documents"),
    *("image_field", "label_field", "augment"),
)
_RATE = ("lr", "min_lr", "lr_schedule", "warmup_steps", "decay_steps", "num_steps")
# what a run keeps, shows and endures, not what it is
_UNHEARD = ("eval_every", "save_every", "keep_checkpoints", "max_skipped_steps", "tensorboard")
_UNREAD = frozenset(  # keys of a configuration that no training step reads
    {
        "_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
        "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "label2id", "output_attentions",
        "output_hidden_states", "pretraining_tp", "problem_type", "return_dict", "summary_activation",
        "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "torch_dtype",
        "transformers_version", "use_cache",
    }
)  # fmt: skip


class Change(NamedTuple):
    """A setting by name, as it was and as it is."""

    name: str
    before: Any
    now: Any


class Lineage(FileRecord):
    """``run.json``, and part of every checkpoint: what a run's samples, model and numbers come from.

    ``config`` is the whole Hugging Face configuration; ``model`` and ``data`` are the job's sections, None for a
    run without a job; ``tokens_sha256`` is of the tokens as little-endian u4, None before they are made.
    """

    FORMAT: ClassVar[str] = "galvatron.run"
    ERROR: ClassVar[type[GalvatronError]] = CheckpointError

    train: TrainSection
    config: dict[str, Any]
    model: ModelSection | None = None
    data: DataSection | None = None
    eval_fraction: float
    tokens_sha256: str | None = None
    versions: dict[str, str]

    @classmethod
    def of_job(cls, job: Job, config: PretrainedConfig) -> Self:
        """What is known of a job before its tokens are."""
        return cls(
            train=job.train,
            config=_plain(config),
            model=job.model,
            data=job.data,
            eval_fraction=job.data.held_out,
            versions=_versions(),
        )

    @classmethod
    def of_run(cls, section: TrainSection, config: PretrainedConfig, dataset: Dataset, job: Job | None) -> Self:
        """What a run that is about to train depends on."""
        return cls(
            train=section,
            config=_plain(config),
            model=None if job is None else job.model,
            data=None if job is None else job.data,
            eval_fraction=dataset.eval_fraction,
            tokens_sha256=dataset.fingerprint,
            versions=_versions(),
        )

    def to_json(self) -> str:
        """The file's text, defaults written out: another version may have others."""
        return dump_json({"format": self.FORMAT, "version": self.VERSION, **self.model_dump(mode="json")})


def _plain(config: PretrainedConfig) -> dict[str, Any]:
    """``config`` in JSON's types, with what it has by default."""
    whole: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return whole


def _versions() -> dict[str, str]:
    return {"galvatron": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def check_goes_on(before: Lineage, now: Lineage, checkpoint: Path) -> None:
    """Raise CheckpointError, naming every difference, unless ``now`` trains ``checkpoint``'s model on its next samples.

    Tokens that one side does not know yet are not compared.
    """
    if before.tokens_sha256 and now.tokens_sha256 and before.tokens_sha256 != now.tokens_sha256:
        raise CheckpointError(
            f"{checkpoint} was trained on other tokens (SHA-256 {before.tokens_sha256[:12]}, "
            f"now {now.tokens_sha256[:12]}); give the same data and tokenizer"
        )
    changes = [*_other_samples(before, now), *_other_model(before, now)]
    if changes:
        was = ", ".join(f"{change.name}={change.before}" for change in changes)
        has = ", ".join(f"{change.name}={change.now}" for change in changes)
        raise CheckpointError(
            f"{checkpoint} was trained with {was} but the job has {has}, so it would not be the same run; set "
            f"{'that' if len(changes) == 1 else 'these'} back, or train from its weights anew (galvatron convert to-hf)"
        )


def notable_changes(before: Lineage, now: Lineage, step: int) -> list[str]:
    """A sentence for everything that changed, may change and changes numbers; ``step`` updates are done."""
    lines = []
    rate = list(_differences(before.train, now.train, _RATE))
    if rate:
        was, becomes = lr_at(step, before.train), lr_at(step, now.train)
        lines.append(f"{_listed(rate)}: the learning rate of step {step + 1} is {becomes:.4g} in place of {was:.4g}")
    others = [name for name in TrainSection.model_fields if name not in (*_SAMPLES, *_RATE, *_UNHEARD)]
    if changes := list(_differences(before.train, now.train, others)):
        lines.append(_listed(changes))
    versions = [Change(name, before.versions.get(name), now.versions[name]) for name in now.versions]
    if changes := [change for change in versions if change.before != change.now]:
        lines.append(f"{_listed(changes)}: numbers go on to rounding, not bit for bit")
    if changes := [change for change in _config_changes(before, now) if _is_of_versions(change, before, now)]:
        lines.append(f"the model's configuration knows other settings: {_listed(changes)}")
    return lines


def _listed(changes: list[Change]) -> str:
    return ", ".join(f"{change.name} was {change.before} and is {change.now}" for change in changes)


def _other_samples(before: Lineage, now: Lineage) -> Iterator[Change]:
    """What decides which tokens a step gets.  Where text lies may change: its tokens are compared."""
    yield from _differences(before.train, now.train, _SAMPLES)
    yield from _differences(before, now, ("eval_fraction",))
    if before.data is not None and now.data is not None:
        yield from _differences(before.data, now.data, _SAID)
        for name in ("tokenizer", "chat_template", "processor"):
            was, is_now = getattr(before.data, name) or "", getattr(now.data, name) or ""
            if Path(was).name != Path(is_now).name:
                yield Change(name, was, is_now)


def _other_model(before: Lineage, now: Lineage) -> Iterator[Change]:
    """What decides what the model computes and which of its parameters learn.  Weights come from the checkpoint."""
    yield from (change for change in _config_changes(before, now) if not _is_of_versions(change, before, now))
    if before.model is not None and now.model is not None:
        others = [name for name in ModelSection.model_fields if name not in ("path", "weights")]
        yield from _differences(before.model, now.model, others)


def _config_changes(before: Lineage, now: Lineage) -> Iterator[Change]:
    was, is_now = _read(before.config), _read(now.config)
    for name in sorted(was.keys() | is_now.keys()):
        if was.get(name) != is_now.get(name):
            yield Change(name, was.get(name), is_now.get(name))


def _read(config: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """What training reads of a configuration; of one within it (``text_config``) by both names."""
    found: dict[str, Any] = {}
    for name in config.keys() - _UNREAD:
        value = config[name]
        found |= _read(value, f"{within}{name}.") if _is_config(value) else {within + name: value}
    return found


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and "model_type" in value


def _is_of_versions(change: Change, before: Lineage, now: Lineage) -> bool:
    """Whether a key that one side lacks is one that the other side's version of transformers added or dropped."""
    is_new = (change.name in _read(before.config)) != (change.name in _read(now.config))
    return is_new and before.versions.get("transformers") != now.versions.get("transformers")


def _differences(before: Any, now: Any, names: Any) -> Iterator[Change]:
    for name in names:
        if getattr(before, name) != getattr(now, name):
            yield Change(name, getattr(before, name), getattr(now, name))
