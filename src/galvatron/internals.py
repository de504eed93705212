"""Private names of PyTorch, transformers and torchao, all that are used, each behind a function of ours.

Takes public objects; gives what no public name gives.  Knows nothing of models, plans or processes.  A private name
may change in any release, so these were run (the tests of this project, ``make test`` and ``make test-lowest``) on

    torch          2.11.0, 2.13.0
    transformers   5.17.0, 5.23.0
    torchao        0.18.0

and pyproject.toml admits what lies between them.  What differed:

    FSDPState._fsdp_param_groups   2.13; 2.11 has one group and calls it _fsdp_param_group
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore, HashStore, PrefixStore, Store, TCPStore
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.distributed_c10d import _get_default_store, _resolve_process_group  # type: ignore[attr-defined]
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import TORCH_INIT_FUNCTIONS

__all__ = [
    "ATTENTION",
    "REDUCE_SCATTER",
    "FakeTensorMode",
    "FileStore",
    "HashStore",
    "PrefixStore",
    "Store",
    "TCPStore",
    "TorchDispatchMode",
    "all_gather",
    "all_to_all",
    "arrived",
    "attend",
    "attend_backward",
    "attend_by_bounds",
    "attends_by_bounds",
    "call_attention",
    "called_attention",
    "changes_in_place",
    "clear_cublas_workspaces",
    "default_store",
    "end_backward",
    "exchange_rows",
    "float8_product",
    "forget_forwards",
    "gathered_buffers",
    "group_named",
    "has_tensor_hooks",
    "hooks",
    "is_compiled",
    "keep_graphs",
    "keep_made",
    "leave_out_advice",
    "local_part",
    "made_value",
    "materialise_shards",
    "multiplies_in_float8",
    "multiply_all_",
    "needless_names",
    "new_group",
    "norms",
    "noted_initialisers",
    "owned",
    "put_buffer",
    "put_parameter",
    "reduce_gradients",
    "reduce_scatter",
    "sharded_parameter",
    "storage_address",
    "takes_generator",
    "to_be_initialised",
    "tree_leaves",
    "tree_map_only",
    "viewed",
    "whole_gradient",
    "without_value_checks",
]


_c10d: Any = torch.distributed.distributed_c10d
_functional = torch.ops._c10d_functional
REDUCE_SCATTER: Any = _functional.reduce_scatter_tensor.default
"""The dispatched operation of ``reduce_scatter``."""
ATTENTION: frozenset[Any] = frozenset(
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    for name in (
        "flash_attention_for_cpu",
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
) | {torch.ops.torch_attn._varlen_attn.default}
"""The dispatched operations of fused attention on any device."""


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[n, ...] of every rank, one after the other along dim 0, by an operation that changes nothing in place."""
    gathered = _functional.all_gather_into_tensor(tensor, group.size(), group.group_name)
    return _functional.wait_tensor(gathered)


def reduce_scatter(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part of the sum over ranks, cut along dim 0, by an operation that changes nothing in place."""
    reduced = _functional.reduce_scatter_tensor(tensor, "sum", group.size(), group.group_name)
    return _functional.wait_tensor(reduced)


def all_to_all(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Entry g of [k, ...] from every rank g, to whom went entry g, by an operation that changes nothing in place."""
    ones = [1] * group.size()
    return _functional.wait_tensor(_functional.all_to_all_single(tensor, ones, ones, group.group_name))


def exchange_rows(tensor: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """[sum(received), ...] from every rank in turn, to whom goes its number of rows of [sum(sent), ...].

    Under way: nobody may look at it before ``arrived``.
    """
    return _functional.all_to_all_single(tensor, received, sent, group.group_name)


def arrived(tensor: torch.Tensor) -> torch.Tensor:
    """What ``exchange_rows`` gave, once it is there."""
    return _functional.wait_tensor(tensor)


def group_named(name: str) -> dist.ProcessGroup:
    """The process group whose ``group_name`` is ``name``."""
    group: dist.ProcessGroup = _resolve_process_group(name)  # type: ignore[arg-type]
    return group


_aten = torch.ops.aten
LSE_ALIGNMENT, BIAS_ALIGNMENT = 32, 16
"""To multiples of which efficient attention rounds up rows of its log-sum-exp, and takes columns of a bias."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    causal: bool,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by a fused kernel: (output [B, N, S, D], log-sum-exp [B, N, S] in float32 or wider).

    Queries [B, N, S, D], keys and values [B, K, T, D] (K divides N); ``mask`` [S, T] or [B, 1, S, T]: which keys a
    query sees.  One that sees none has zeros and -inf.  Values may have another head size than keys; kernels are given
    zeros to make them equal.
    """
    values = value.shape[-1]
    query, key, value = _widened(query, key, value)
    bias = _bias(query, key, causal=causal, mask=mask)
    if query.device.type == "cpu":
        out, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal and bias is None, attn_mask=bias, scale=scale
        )
    elif bias is None:
        out, log_sum, *_ = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
    else:
        key, value = _as_many_heads(query, key), _as_many_heads(query, value)
        bias = bias.expand(*query.shape[:2], -1, -1)
        out, log_sum, *_ = _aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scale)
        log_sum = log_sum[:, :, : query.shape[2]]
    out = out[..., :values]
    if mask is not None:
        sees = mask.any(dim=-1).to(query.device)
        out = torch.where(sees[..., None], out, 0.0)
        log_sum = torch.where(sees, log_sum, -torch.inf)
    return out, log_sum


def attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    scale: float,
    *,
    causal: bool,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; ``out`` and ``log_sum`` are those of all keys, of which these are some."""
    sizes = query.shape[-1], key.shape[-1], value.shape[-1]
    grad, query, key, value, out = _widened(grad, query, key, value, out)
    gradients = _attend_backward(grad, query, key, value, out, log_sum, scale, causal=causal, mask=mask)
    of_query, of_key, of_value = (found[..., :size] for found, size in zip(gradients, sizes, strict=True))
    return of_query, of_key, of_value


def _widened(*heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All of the largest head size, with zeros behind."""
    widest = max(tensor.shape[-1] for tensor in heads)
    return tuple(nn.functional.pad(tensor, (0, widest - tensor.shape[-1])) for tensor in heads)


def _attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    scale: float,
    *,
    causal: bool,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    bias = _bias(query, key, causal=causal, mask=mask)
    if query.device.type == "cpu":
        of_query, of_key, of_value = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, log_sum, 0.0, causal and bias is None, attn_mask=bias, scale=scale
        )
        return of_query, of_key, of_value
    unused, lengths = torch.zeros(2, dtype=torch.uint64, device=query.device), (query.shape[2], key.shape[2])
    if bias is None:
        of_query, of_key, of_value = _aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, out, log_sum, None, None, *lengths, 0.0, causal, unused, unused, scale=scale
        )
        return of_query, of_key, of_value
    heads = key.shape[1]
    log_sum = nn.functional.pad(log_sum, (0, -query.shape[2] % LSE_ALIGNMENT), value=torch.inf)
    key, value = _as_many_heads(query, key), _as_many_heads(query, value)
    bias = bias.expand(*query.shape[:2], -1, -1)
    of_query, of_key, of_value, _ = _aten._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, bias, out, log_sum, unused, unused, 0.0, [True, True, True, False], scale=scale
    )
    return of_query, of_key.unflatten(1, (heads, -1)).sum(2), of_value.unflatten(1, (heads, -1)).sum(2)


_HAS_VARLEN = {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()
"""Whether torch's function of documents by bounds has windows and fewer heads of keys than of queries."""


def attends_by_bounds(query: torch.Tensor, bounds: torch.Tensor | None, dropout: float) -> bool:
    """Whether ``attend_by_bounds`` has a kernel for it: flash attention's, of half precisions and without dropout."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return bounds is not None and not dropout and half and _HAS_VARLEN


def attend_by_bounds(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention within each document, without a mask: [B, N, S, D].

    Shapes as of ``attend``; ``bounds`` [documents + 1] are of all rows, one after the other.
    """
    rows, _, tokens, _ = query.shape
    flat = [heads.transpose(1, 2).flatten(0, 1) for heads in (query, key, value)]
    left, fewer = -1 if window is None else window - 1, query.shape[1] != key.shape[1]
    attend: Any = varlen_attn
    out = attend(*flat, bounds, bounds, tokens, tokens, scale=scale, window_size=(left, 0), enable_gqa=fewer)
    return out.unflatten(0, (rows, tokens)).transpose(1, 2)


def _bias(query: torch.Tensor, key: torch.Tensor, *, causal: bool, mask: torch.Tensor | None) -> torch.Tensor | None:
    """What is added to scores [..., S, T], where a kernel takes no flag for it: masks, and on CUDA all of float32."""
    if mask is None and (query.device.type == "cpu" or query.dtype in (torch.bfloat16, torch.float16)):
        return None
    rows, columns = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(rows, columns, dtype=torch.bool)
        mask = mask.tril() if causal else mask
    bias = query.new_zeros(*mask.shape[:-2], rows, columns + -columns % BIAS_ALIGNMENT)[..., :columns]
    return bias.masked_fill_(~mask.to(query.device), -torch.inf)


def _as_many_heads(query: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    return heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1)


def new_group(ranks: tuple[int, ...], device: torch.device, purpose: str) -> dist.ProcessGroup:
    """The group of global ``ranks``, made by its members alone and connected at once on ``device``.

    A default group that is bound to a device makes torch split its communicator for every other group, which all ranks
    of the world have to take part in: members alone would wait for ever.  So it is not bound meanwhile.

    Such a group's name torch makes of its ranks and of how many groups a rank has, which must then be equal on all of
    its members.  Those of two stages differ, so here the count is of groups of the same ranks and ``purpose``.
    """
    if device.type == "cuda":
        # messages of one direction between two ranks are meant to go in turn
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "0")
    default: Any = dist.group.WORLD
    bound, default.bound_device_id = default.bound_device_id, None
    alike = f"{purpose} of {','.join(map(str, ranks))}, "
    made = sum(name.startswith(alike) for name in _c10d._world.pg_names.values())
    usual, _c10d._process_group_name = _c10d._process_group_name, lambda *_, **__: f"{alike}{made}"
    try:
        group: dist.ProcessGroup = dist.new_group(
            list(ranks),
            use_local_synchronization=True,
            group_desc=purpose,
            device_id=None if device.type == "cpu" else device,
        )
    finally:
        default.bound_device_id, _c10d._process_group_name = bound, usual
    return group


def default_store() -> Store:
    """The store at which the ranks of the default process group met."""
    return _get_default_store()


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


def end_backward(root: FSDPModule) -> None:
    """What FSDP2 does at the end of a backward of ``root``: reduce what a unit has not, wait for all reductions."""
    root._get_fsdp_state()._root_post_backward_final_callback()


def local_part(tensor: DTensor) -> torch.Tensor:
    """This rank's part itself; ``to_local`` may make a view of it, and autograd may watch that."""
    return tensor._local_tensor


def multiply_all_(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply every tensor by ``factor``, in few kernels."""
    torch._foreach_mul_(tensors, factor)


def multiplies_in_float8(linear: nn.Module) -> bool:
    """Whether torchao has made ``linear`` multiply in float8."""
    return hasattr(linear, "linear_mm_config")


def float8_product(linear: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weightᵀ`` as ``linear``, of torchao's, multiplies, without its bias."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    return matmul_with_hp_or_float8_args.apply(x, weight.t(), linear.linear_mm_config, linear.config)


def norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    """[number of tensors]: the 2-norm of each, in few kernels."""
    return torch.stack(torch._foreach_norm(tensors))


@contextmanager
def without_value_checks() -> Iterator[None]:
    """Let models of transformers not look at values (that a text has as many image tokens as its images make)."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def put_parameter(module: nn.Module, name: str, value: nn.Parameter) -> None:
    """Replace a parameter without ``register_parameter``."""
    module._parameters[name] = value


def put_buffer(module: nn.Module, name: str, value: torch.Tensor | None) -> None:
    """Replace a buffer; whether it is saved with the module stays as it is."""
    module._buffers[name] = value


def materialise_shards(module: nn.Module, device: torch.device) -> None:
    """Give memory on ``device`` to what FSDP2 holds of ``module``'s parameters, and to nothing else."""
    module._apply(lambda held: torch.empty_like(held, device=device) if isinstance(held, DTensor) else held)


def hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """Whatever is called before or after the module's own forward or backward."""
    for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
        yield from getattr(module, kind).values()


def has_tensor_hooks(tensor: torch.Tensor) -> bool:
    """Whether anything is called with the tensor's gradient."""
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called: calls then go to the compiled code."""
    return module._compiled_call_impl is not None


def keep_graphs(number: int) -> None:
    """Let the compiler make up to ``number`` graphs of one function before it gives up on it."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, number)


def clear_cublas_workspaces() -> None:
    """Free the buffers that cuBLAS keeps within PyTorch's allocator until it is called again (CUDA builds alone)."""
    clear: Any = torch._C._cuda_clearCublasWorkspaces
    clear()


def leave_out_advice() -> None:
    """Silence what the compiler says of every selective checkpoint: to beware of in-place operations."""
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()


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


def viewed(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor that ``tensor`` is a view of; None where it is no view."""
    return tensor._base


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements as no view of another tensor, whose hooks FSDP2 warns that it may lose; nothing is copied."""
    whole: torch.Tensor = _aten._unsafe_view(tensor, tensor.shape)
    return whole


def call_attention(config: PretrainedConfig, name: str) -> None:
    """Make the modules built from ``config`` call the attention registered as ``name``, without checking the name."""
    config._attn_implementation = name


def called_attention(config: PretrainedConfig) -> str | None:
    """The name of the attention that modules built from ``config`` call."""
    name: str | None = config._attn_implementation
    return name


def to_be_initialised(module: nn.Module) -> None:
    """Let transformers initialise a module that it has initialised before."""
    module._is_hf_initialized = False  # type: ignore[assignment]


def needless_names(model: PreTrainedModel) -> list[str]:
    """Patterns of tensors that old files have and ``model`` computes itself: masks, rotary tables, positions."""
    return [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]


def model_mapping(auto_class: Any) -> Any:
    """From a config's class to the class, or classes, of models that an auto class of transformers builds."""
    return auto_class._model_mapping


def model_types(auto_class: Any) -> list[str]:
    """The types of models that an auto class of transformers builds."""
    return list(auto_class._model_mapping._model_mapping)
