"""The release, where both halves can say it."""

__version__ = "0.1.0"
