"""What FSDP2 holds and does: gathered buffers, gradients before they are reduced, the end of a backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def gathered_buffers(module: FSDPModule) -> Iterator[torch.Tensor]:
    """The buffers that FSDP2 gathers the parameters of ``module``'s group into."""
    for group in _groups(module):
        for parameter in group.fsdp_params:
            yield from parameter.all_gather_outputs


def forget_forwards(module: FSDPModule) -> None:
    """Drop the order of forwards, which FSDP2 keeps for prefetching until a backward of the whole model ends."""
    for group in _groups(module):
        group.comm_ctx.post_forward_order.clear()
        group._post_forward_indices.clear()


def _groups(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    return state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]


def sharded_parameter(unit: FSDPModule, module: nn.Module, name: str) -> Any:
    """FSDP2's own record of a parameter of ``unit``."""
    parameters = [parameter for group in _groups(unit) for parameter in group.fsdp_params]
    return next(p for p in parameters if (p._module_info.module, p._module_info.param_name) == (module, name))


def whole_gradient(parameter: Any) -> torch.Tensor:
    """The gradient of a ``sharded_parameter`` that FSDP2 will reduce, zeros where there is none yet; to be added to."""
    own, dtype = parameter._unsharded_param, parameter.reduce_dtype
    if dtype is None or dtype == own.dtype:
        if own.grad is None:
            own.grad = torch.zeros_like(own)
        return own.grad
    if parameter.unsharded_accumulated_grad is None:
        parameter.unsharded_accumulated_grad = torch.zeros_like(own, dtype=dtype)
    return parameter.unsharded_accumulated_grad


def reduce_gradients(unit: FSDPModule, *, fill: bool) -> None:
    """What FSDP2 does for ``unit`` at the end of its backward, as it is set; ``fill``: zeros where no gradient is."""
    for group in _groups(unit):
        for parameter in group.fsdp_params:
            if fill and parameter.sharded_param.requires_grad:
                whole_gradient(parameter)
        group.post_backward()


def is_in_forward(unit: FSDPModule) -> bool:
    """Whether modules of a group have run in this forward, but not all."""
    return bool(unit._get_fsdp_state()._modules_to_run_forward)


def begin_backward(unit: FSDPModule, gradient: torch.Tensor) -> None:
    """What FSDP2 does when the ``gradient`` of what ``unit`` gave is there: gather it; nothing if it has been done."""
    unit._get_fsdp_state()._pre_backward(gradient)


def end_backward(root: FSDPModule) -> None:
    """What FSDP2 does at the end of a backward of ``root``: reduce what a unit has not, wait for all reductions."""
    root._get_fsdp_state()._root_post_backward_final_callback()


def local_part(tensor: DTensor) -> torch.Tensor:
    """This rank's part itself; ``to_local`` may make a view of it, and autograd may watch that."""
    return tensor._local_tensor


def materialise_shards(module: nn.Module, device: torch.device) -> None:
    """Give memory on ``device`` to what FSDP2 holds of ``module``'s parameters, and to nothing else."""
    module._apply(lambda held: torch.empty_like(held, device=device) if isinstance(held, DTensor) else held)
