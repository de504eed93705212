"""What went wrong outside of Galvatron and is the user's to mend, as one sentence.

Takes an exception of Python or of the system; gives a GalvatronError, or None where it looks like a bug.
"""

from __future__ import annotations

from galvatron.core.errors import ConfigError, GalvatronError
from galvatron.core.files import as_output_error

OPTIONAL = (
    "datasets",
    "huggingface_hub",
    "safetensors",
    "tensorboard",
    "tokenizers",
    "torch",
    "transformers",
    "xxhash",
)
"""What ``galvatron[train]`` brings and the search does without."""


def as_mistake(error: BaseException) -> GalvatronError | None:
    """The sentence for ``error``: itself if it is one already, a missing extra, or a disk that refused."""
    if isinstance(error, GalvatronError):
        return error
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").partition(".")[0]
        if missing in OPTIONAL:
            return ConfigError(f"this needs {missing}, which is not installed; pip install 'galvatron[train]'")
    return as_output_error(error) if isinstance(error, OSError) else None
