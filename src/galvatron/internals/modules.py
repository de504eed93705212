"""Modules and the compiler: parameters put in place, hooks, graphs, initial values."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.initialization import TORCH_INIT_FUNCTIONS


def put_parameter(module: nn.Module, name: str, value: nn.Parameter) -> None:
    """Replace a parameter without ``register_parameter``."""
    module._parameters[name] = value


def put_buffer(module: nn.Module, name: str, value: torch.Tensor | None) -> None:
    """Replace a buffer; whether it is saved with the module stays as it is."""
    module._buffers[name] = value


def hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """Whatever is called before or after the module's own forward or backward."""
    for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
        yield from getattr(module, kind).values()


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called: calls then go to the compiled code."""
    return module._compiled_call_impl is not None


def keep_graphs(number: int) -> None:
    """Let the compiler make up to ``number`` graphs of one function before it gives up on it."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, number)


def leave_out_advice() -> None:
    """Silence what the compiler says of every selective checkpoint: to beware of in-place operations."""
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()


@contextmanager
def noted_initialisers(note: Callable[..., None]) -> Iterator[None]:
    """Within, transformers' calls of what torch does not run on meta go to ``note`` (function, tensor, options)."""
    functions: dict[str, Any] = TORCH_INIT_FUNCTIONS
    usual = {name: functions[name] for name in ("trunc_normal_", "orthogonal_", "dirac_", "sparse_")}
    for name, function in usual.items():
        functions[name] = partial(note, function)
    try:
        yield
    finally:
        functions.update(usual)


def keep_made(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Let a ``parameter`` on meta keep the ``value`` that its module made it with."""
    parameter.galvatron_made = value  # type: ignore[attr-defined]


def made_value(parameter: torch.Tensor) -> torch.Tensor | None:
    """What ``keep_made`` kept."""
    value: torch.Tensor | None = getattr(parameter, "galvatron_made", None)
    return value
