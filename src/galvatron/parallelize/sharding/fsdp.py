"""ZeRO by FSDP2, one group a unit, each on its own strategy's mesh.

ZeRO 3 frees parameters after use (a head's at once only where its backward is not next); 1 and 2 keep them gathered
from the first forward to the last backward.
ZeRO 2 and 3 reduce-scatter gradients every microbatch; 1 accumulates and reduces after the last.  Losses
are shares of the global loss, so every reduction is a plain sum (divide factor 1).

What waits, and what does not: FSDP2 lets the backward of a unit wait for the reduction of the unit behind it (on CUDA
the stream, on gloo the thread), so a microbatch's gradient message waits for the reductions of its own backward.  ZeRO
1 has none but the last's: a stage that sends messages back (``sends_back``) reduces after its last backward instead,
the others beside it.  Gathers that serve a whole step run before the first microbatch is there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from galvatron import internals
from galvatron.core.model import Precision, ReduceDtype, shard_dim
from galvatron.plan import LayerStrategy

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ShardedUnit:
    """Modules that FSDP2 gathers and reduces together; ``strategy.zero`` is 1, 2 or 3.

    ``turns``: the backward begins where its forward ends, so what is gathered serves both.
    """

    modules: tuple[nn.Module, ...]
    strategy: LayerStrategy
    turns: bool = False


def mixed_precision(precision: Precision, grad_reduce_dtype: ReduceDtype) -> MixedPrecisionPolicy:
    """Compute in ``precision``, reduce gradients in ``grad_reduce_dtype``; parameters stay float32."""
    compute = None if precision == "fp32" else DTYPES[precision]
    reduce = None if grad_reduce_dtype == precision else DTYPES[grad_reduce_dtype]
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)


def shard_unit(
    unit: ShardedUnit, mesh: DeviceMesh, policy: MixedPrecisionPolicy, ignored: Collection[nn.Parameter] = ()
) -> None:
    """Hand the parameters of ``unit`` to FSDP2 on ``mesh``, but for ``ignored`` and what it has already."""
    modules = unit.modules[0] if len(unit.modules) == 1 else list(unit.modules)
    frees = unit.strategy.zero == 3 and not unit.turns
    num_shards = mesh.size(-1)
    for module in unit.modules:
        module.forward = partial(_owned_output, module.forward)
    fully_shard(
        modules,
        mesh=mesh,
        reshard_after_forward=frees,
        mp_policy=policy,
        shard_placement_fn=lambda parameter: Shard(shard_dim(tuple(parameter.shape), num_shards)),
        ignored_params=set(ignored),
    )
    face = _face(unit)
    if all(isinstance(module, nn.Embedding) for module in unit.modules):
        face.set_unshard_in_backward(False)  # which needs no value of theirs
    # gloo has no pre-multiplied sum; with factor 1 a sum is what is meant anyway
    face.set_force_sum_reduction_for_comms(True)
    face.set_gradient_divide_factor(1.0)
    if len(unit.modules) > 1:
        _gather_without_last(unit)


def _gather_without_last(unit: ShardedUnit) -> None:
    """Gather the unit for the backward also where the last of its modules gives nothing with a gradient.

    FSDP2 gathers a group when the gradient of what its last module gave is there; after Whisper's convolutions comes a
    table of positions that is not trained.
    """
    face, waits = _face(unit), [False]

    def gather(waited: list[bool], gradient: Tensor) -> None:
        if waited[0]:
            internals.begin_backward(face, gradient)

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal waits
        outputs = [leaf for leaf in internals.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if internals.is_in_forward(face):
            for each in outputs:
                each.register_hook(partial(gather, waits))
        else:
            waits[0], waits = not outputs, [False]

    for module in unit.modules:
        module.register_forward_hook(hook)


def _owned_output(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """No view of another tensor, whose hooks FSDP2 may lose.

    LLaVA's projector gives one of a part of the states, T5's layers hand on the bias that FSDP2 gives them as one, and
    stages between decoders an encoder's states.
    """

    def own(output: Tensor) -> Tensor:
        return output if internals.viewed(output) is None else internals.owned(output)

    return internals.tree_map_only(Tensor, own, forward(*args, **kwargs))


def shard_root(root: nn.Module, mesh: DeviceMesh, unsharded: Iterable[nn.Parameter], last: ShardedUnit) -> None:
    """Let ``root`` speak for the units within it; it has no parameters of its own beside ``unsharded``.

    The ``last`` unit's backward ends a microbatch's: without the root, which has nothing to gather, FSDP2 would gather
    the unit that went forward before it, which is the last one of the microbatch before.
    """
    root.forward = partial(_owned_output, root.forward)
    fully_shard(root, mesh=mesh, reshard_after_forward=False, ignored_params=set(unsharded))
    assert isinstance(root, FSDPModule)
    _face(last).set_modules_to_backward_prefetch([root])


def prefetch_in_forward(before: ShardedUnit, after: ShardedUnit) -> None:
    """Let a unit gather the one that begins after it in the forward pass, while it computes."""
    _face(before).set_modules_to_forward_prefetch([_face(after)])


def prefetch_in_backward(before: ShardedUnit, after: ShardedUnit) -> None:
    """The same in the backward pass."""
    _face(before).set_modules_to_backward_prefetch([_face(after)])


def gather_for_step(units: Iterable[ShardedUnit]) -> None:
    """Gather what stays gathered through the step, before there is anything to compute."""
    for unit in units:
        if unit.strategy.zero < 3:
            _face(unit).unshard()


def prepare_backward(
    root: nn.Module,
    units: Collection[ShardedUnit],
    *,
    is_last: bool,
    reduces_last: bool,
    later: Collection[ShardedUnit] = (),
) -> None:
    """Say what the coming backward pass of a microbatch reduces and frees; ``is_last``: of this step's last one.

    ``reduces_last``: what is reduced once a step waits for ``reduce_held``; ``later``: those of the units of which
    ``reduce_now`` or ``reduce_held`` alone reduces anything.
    """
    if not units:
        return
    assert isinstance(root, FSDPModule)
    root.set_is_last_backward(is_last and not reduces_last)
    for unit in units:
        zero, face = unit.strategy.zero, _face(unit)
        reduces = unit not in later and (zero >= 2 or (is_last and not reduces_last))
        face.set_requires_gradient_sync(reduces, recurse=False)
        face.set_requires_all_reduce(is_last, recurse=False)
        face.set_reshard_after_backward(zero == 3 or (is_last and reduces), recurse=False)


def whole_gradient(unit: ShardedUnit, module: nn.Module, name: str) -> Callable[[], torch.Tensor]:
    """What gives the gradient of one of the unit's parameters before it is reduced, to be added to."""
    return partial(internals.whole_gradient, internals.sharded_parameter(_face(unit), module, name))


def reduce_now(unit: ShardedUnit, is_last: bool) -> None:
    """Reduce what the unit has of gradients; ``is_last``: for the last time in this step, after which it is freed."""
    face = _face(unit)
    face.set_requires_gradient_sync(True, recurse=False)
    face.set_requires_all_reduce(is_last, recurse=False)
    face.set_reshard_after_backward(is_last or unit.strategy.zero == 3, recurse=False)
    # FSDP2 adds up over reductions what replicas will sum, and needs the same parameters in each; an earlier one may
    # have had the norms of two microbatches
    internals.reduce_gradients(face, fill=unit.strategy.dp_replicate > 1)


def reduce_held(root: nn.Module, units: Collection[ShardedUnit]) -> None:
    """At the end of a step that ``reduces_last``: reduce and free what has been held until now."""
    if not units:
        return
    assert isinstance(root, FSDPModule)
    root.set_is_last_backward(True)
    for unit in units:
        face = _face(unit)
        face.set_requires_gradient_sync(True, recurse=False)
        face.set_reshard_after_backward(True, recurse=False)
    internals.end_backward(root)


def free_gathered(units: Iterable[ShardedUnit]) -> None:
    """Drop gathered parameters, as after a forward pass that no backward follows."""
    for unit in units:
        _face(unit).reshard()
        internals.forget_forwards(_face(unit))


def gathered_buffers(units: Iterable[ShardedUnit]) -> Iterator[torch.Tensor]:
    """The buffers that FSDP2 gathers parameters into; it resizes them to nothing while they are not in use."""
    for unit in units:
        yield from internals.gathered_buffers(_face(unit))


def _face(unit: ShardedUnit) -> FSDPModule:
    """The unit as FSDP2 knows it; grouped modules share one state, so the first speaks for all."""
    first = unit.modules[0]
    assert isinstance(first, FSDPModule)
    return first
