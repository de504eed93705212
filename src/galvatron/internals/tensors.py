"""Tensors, kernels over many of them, dispatched operations, and products in float8."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


def multiply_all_(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply every tensor by ``factor``, in few kernels."""
    torch._foreach_mul_(tensors, factor)


def norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    """[number of tensors]: the 2-norm of each, in few kernels."""
    return torch.stack(torch._foreach_norm(tensors))


def storage_address(tensor: torch.Tensor) -> int:
    """What tells the storage under ``tensor`` from all others alive; fake storages have one too."""
    return int(tensor.untyped_storage()._cdata)


def is_in_backward() -> bool:
    """Whether autograd is running this thread's code: what runs again for a backward."""
    return bool(torch._C._current_graph_task_id() != -1)


def changes_in_place(op: Any) -> bool:
    """Whether a dispatched operation (a ``torch.ops`` overload) writes into its first argument."""
    return str(op._schema.name).endswith("_")


def takes_generator(op: Any) -> bool:
    """Whether an operation, dispatched or of ``torch.nn.init``, draws random numbers from a generator it is given."""
    schema = getattr(op, "_schema", None)
    if schema is None:
        return "generator" in inspect.signature(op).parameters
    return any(argument.name == "generator" for argument in schema.arguments)


def viewed(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor that ``tensor`` is a view of; None where it is no view."""
    return tensor._base


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements as no view of another tensor, whose hooks FSDP2 warns that it may lose; nothing is copied."""
    whole: torch.Tensor = torch.ops.aten._unsafe_view(tensor, tensor.shape)
    return whole


def has_tensor_hooks(tensor: torch.Tensor) -> bool:
    """Whether anything is called with the tensor's gradient."""
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def clear_cublas_workspaces() -> None:
    """Free the buffers that cuBLAS keeps within PyTorch's allocator until it is called again (CUDA builds alone)."""
    clear: Any = torch._C._cuda_clearCublasWorkspaces
    clear()


def multiplies_in_float8(linear: nn.Module) -> bool:
    """Whether torchao has made ``linear`` multiply in float8."""
    return hasattr(linear, "linear_mm_config")


def float8_product(linear: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weightᵀ`` as ``linear``, of torchao's, multiplies, without its bias."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    return matmul_with_hp_or_float8_args.apply(x, weight.t(), linear.linear_mm_config, linear.config)
