"""The dataset of a run: what its model is trained for decides what a sample is.

Takes a job's sections and a run directory; gives a Dataset, equal on all ranks.  Rank 0 looks at everything first.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PretrainedConfig

from galvatron.core.errors import DataError
from galvatron.core.job import DataSection, TrainSection
from galvatron.core.tasks import WITH_MEDIA, Task
from galvatron.models import class_names, task_of
from galvatron.parallelize.processes.ranks import on_rank_zero, together

from .data import Dataset
from .kinds import Loaded, Wanted, check_media, check_task, kind_in_memory, of_tokens
from .tasks.classes import Numbering, classes_of, named_classes
from .text import Skipped
from .tokens import Progress, TokenInfo, prepare_tokens


def load_dataset(
    data: DataSection,
    train: TrainSection,
    run_dir: Path,
    *,
    config: PretrainedConfig | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """The dataset of a run.  A collective call: rank 0 tokenises once into ``run_dir/data``, all ranks map the file.

    Args:
        data, train: the job's sections.
        run_dir: on a disk that all nodes share.
        config: of the model, by whose task samples are made; of a causal language model where it is left out.
        progress: called on rank 0 with the number of tokens so far.

    Raises:
        DataError: a source is missing, unreadable, empty, too short, or not what the model takes.
    """
    config = config or PretrainedConfig()
    names = class_names(config)
    loaded = _load(data, train, run_dir, config, progress, lambda labels: classes_of(labels, names))
    validation = None
    if (own := data.of_validation) is not None:
        validation = _dataset(_load(own, train, run_dir, config, progress, lambda _: loaded.classes), train, 1.0)
    named = named_classes(loaded.classes, names) if loaded.classes else ()
    return _dataset(loaded, train, data.held_out, named, validation)


def prepare_source(
    data: DataSection,
    train: TrainSection,
    run_dir: Path,
    *,
    task: Task = "causal_lm",
    progress: Progress | None = None,
    skipped: Skipped | None = None,
) -> Path:
    """Find what is wrong with ``data.source``, and tokenise it if it is text; one process only.  The file to read."""
    check_task(data, task)
    if task in WITH_MEDIA:
        check_media(data, task)
    if kind_in_memory(data, task) is not None:
        return Path(data.source)  # which is read as a whole, with the tokenizer
    return prepare_tokens(data, run_dir, seq_len=train.seq_len, progress=progress, skipped=skipped)


def _dataset(
    loaded: Loaded,
    train: TrainSection,
    eval_fraction: float,
    class_names: tuple[str, ...] = (),
    validation: Dataset | None = None,
) -> Dataset:
    return Dataset(
        loaded.samples,
        global_batch_size=train.global_batch_size,
        seed=train.seed,
        eval_fraction=eval_fraction,
        vocab_size=loaded.vocab_size,
        skipped=loaded.skipped,
        fingerprint=loaded.fingerprint,
        class_names=class_names,
        validation=validation,
    )


def _load(
    data: DataSection,
    train: TrainSection,
    run_dir: Path,
    config: PretrainedConfig,
    progress: Progress | None,
    number: Numbering,
) -> Loaded:
    task: Task = task_of(config) if config.model_type else "causal_lm"
    check_task(data, task)
    if (make := kind_in_memory(data, task)) is not None:
        skipped = Skipped(data.skip_bad_records)
        loaded = together(lambda: make(data, Wanted(train.seq_len, config, number, skipped)))
        return replace(loaded, skipped=skipped)
    path = on_rank_zero(lambda: prepare_tokens(data, run_dir, seq_len=train.seq_len, progress=progress))
    info = together(lambda: TokenInfo.load(path.with_suffix(".json")))
    tokens = together(lambda: _map_tokens(path, info.num_tokens))
    samples = together(lambda: of_tokens(data, task, tokens, train.seq_len))
    return Loaded(samples, info.vocab_size, info.sha256)


def _map_tokens(path: Path, num_tokens: int) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}; put the run directory on a disk that all nodes share, or delete the file"
        ) from None
    if tokens.shape != (num_tokens,):
        raise DataError(f"{path} must hold {num_tokens} tokens but has shape {tokens.shape}; delete it")
    return np.asarray(tokens)
