"""The exception tree: one class per kind of mistake a user can make.

    GalvatronError
    ├── ConfigError        a job file, option or model configuration is wrong
    │   └── UnfitError     a type of model is none that galvatron trains; carries the rule
    ├── ProfileError       a profile is missing, malformed or lacks a measurement
    ├── InfeasibleError    no plan fits; carries the tightest constraint
    ├── PlanError          a plan breaks a rule of its model, its batch or its world
    ├── CheckpointError    a checkpoint is missing, truncated or of another model
    ├── DataError          a dataset is empty, unreadable or too short; a batch is not what the plan or model takes
    ├── OutputError        a file cannot be written: a folder in its place, no permission, a full disk
    ├── WorldError         this process and the others of its run cannot meet, or no longer hear each other
    └── UnsupportedError   a parallel model is asked for what only a model in one process has

A message is rule + values + remedy: ``tp=3 must divide num_heads=32; choose 1, 2, 4, 8, 16 or 32``.
The command line prints the message alone and exits with code 2.
"""

from __future__ import annotations


class GalvatronError(Exception):
    """A mistake that the user can mend; the message is one sentence of rule, values and remedy."""


class ConfigError(GalvatronError):
    """A job file, option or model configuration is wrong."""


class UnfitError(ConfigError):
    """A type of model is none that galvatron trains.

    Attributes:
        rule: what is so of this type, as of others.
        detail: what was seen of this one.
    """

    def __init__(self, model_type: str, rule: str, remedy: str, detail: str = "") -> None:
        super().__init__(model_type, rule, remedy, detail)  # with which it is made again in another process
        self.model_type, self.rule, self.remedy, self.detail = model_type, rule, remedy, detail

    def __str__(self) -> str:
        seen = f" ({self.detail})" if self.detail else ""
        return f"model_type={self.model_type!r} {self.rule}{seen}; {self.remedy}"


class ProfileError(GalvatronError):
    """A profile is missing, malformed or lacks a measurement."""


class InfeasibleError(GalvatronError):
    """No plan fits.

    Attributes:
        constraint: the tightest constraint, in words (``"memory of stage 0"``).
        needed_bytes: the memory a device that would be enough; None where memory is not what is missing.
    """

    def __init__(self, message: str, constraint: str = "", needed_bytes: int | None = None) -> None:
        super().__init__(message)
        self.constraint = constraint
        self.needed_bytes = needed_bytes


class PlanError(GalvatronError):
    """A plan breaks a rule of its model, its batch or its world."""


class CheckpointError(GalvatronError):
    """A checkpoint is missing, truncated or of another model."""


class DataError(GalvatronError):
    """A dataset is empty, unreadable or too short; a batch is not what the plan or model takes."""


class OutputError(GalvatronError):
    """A file cannot be written: a folder in its place, no permission, a full disk."""


class WorldError(GalvatronError):
    """This process and the others of its run cannot meet, or no longer hear each other: each speaks for itself."""


class UnsupportedError(GalvatronError, AttributeError):
    """A parallel model is asked for what only a model in one process has; ``hasattr`` is False of it."""
