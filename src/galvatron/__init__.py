"""Automatic distributed training for Transformers: profile, search the fastest plan that fits, train with it.

    result = galvatron.search(model_profile, hardware_profile, global_batch_size=512)
    model = galvatron.parallelize(hf_model, result.plan)

Names load when first used, so that the deciding half works where torch is not installed.  ``search`` and
``parallelize`` are packages that can be called: a call is their function of the same name.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from galvatron.core.version import __version__

if TYPE_CHECKING:
    from galvatron.core.errors import GalvatronError
    from galvatron.core.hardware import HardwareProfile
    from galvatron.core.job import Job
    from galvatron.core.model import ModelSpec
    from galvatron.core.model_profile import ModelProfile
    from galvatron.parallelize import ParallelModel, parallelize
    from galvatron.plan import LayerStrategy, Plan
    from galvatron.search import search

__all__ = [
    "GalvatronError",
    "HardwareProfile",
    "Job",
    "LayerStrategy",
    "ModelProfile",
    "ModelSpec",
    "ParallelModel",
    "Plan",
    "__version__",
    "parallelize",
    "search",
]

_HOMES = {
    "GalvatronError": "galvatron.core.errors",
    "HardwareProfile": "galvatron.core.hardware",
    "Job": "galvatron.core.job",
    "LayerStrategy": "galvatron.plan",
    "ModelProfile": "galvatron.core.model_profile",
    "ModelSpec": "galvatron.core.model",
    "ParallelModel": "galvatron.parallelize",
    "Plan": "galvatron.plan",
}
_CALLABLE = ("parallelize", "search")


class _CallablePackage(ModuleType):
    """A package ``p`` whose call is ``p.p``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """This package: however ``search`` and ``parallelize`` come to be imported, they can be called."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLABLE and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
