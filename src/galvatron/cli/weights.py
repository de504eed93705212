"""The weights that a job starts from: a checkpoint's, and those that the job's own task adds to them.

Takes a job and its model's configuration; gives what ``parallelize`` reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from galvatron.core.errors import ConfigError
from galvatron.core.job import Job

if TYPE_CHECKING:
    from galvatron.parallelize.state.weights import CompletedWeights


def first_weights(job: Job, config: Any) -> CompletedWeights:
    """The safetensors beside a config file, in a directory, or of a hub name (fetched once by rank 0).

    Parameters that the checkpoint's own config does not describe, or describes of another size, are new: the head of a
    classifier of texts that starts from a model of masked words, or of other classes.  They begin from ``train.seed``.

    Raises:
        CheckpointError: it has no weights that can be read.
        ConfigError: some are new that adapters would leave as they begin.
    """
    from galvatron.models import InitialWeights, meta_model
    from galvatron.parallelize import SafetensorsWeights
    from galvatron.parallelize.processes.ranks import together
    from galvatron.parallelize.state.weights import CompletedWeights

    model, directory = meta_model(config), _fetched(job.model.path)
    given = together(lambda: SafetensorsWeights(directory, base_prefix=model.base_model_prefix))
    new = together(lambda: _new_names(given, model, job.model.path))
    if new and job.model.lora is not None:
        raise ConfigError(
            f"{directory} has no {new[0]} as this task needs it, and lora would leave it as it begins; train it first, "
            "with freeze in place of lora"
        )
    return CompletedWeights(given, InitialWeights(model, job.train.seed) if new else given, new)


def directory_of(path: str) -> str:
    """Where weights lie beside a config: in its directory, or at a hub name."""
    return str(Path(path).parent) if Path(path).is_file() else path


def _fetched(path: str) -> Path:
    from galvatron.parallelize.processes.ranks import on_rank_zero

    directory = Path(directory_of(path))
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json"]
    return Path(on_rank_zero(lambda: snapshot_download(path, allow_patterns=patterns)))


def _new_names(given: Any, model: Any, path: str) -> list[str]:
    """Parameters of ``model`` that ``given`` lacks, or has of another size, as the config at ``path`` says too."""
    from galvatron.models import described_shapes

    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    unlike = [name for name, shape in wanted.items() if given.find(name) is None or given.shape(name) != shape]
    described = described_shapes(path) if unlike else {}
    return [name for name in unlike if described.get(name) != wanted[name]]
