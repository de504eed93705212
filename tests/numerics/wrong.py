"""What makes a wrong function of a right one: it drops a term, scales, forgets the other rank or confuses the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from galvatron.internals import attend, is_in_backward
from galvatron.parallelize.layers.hops import Ring
from galvatron.parallelize.processes.collectives import AxisGroup, all_gather, join, own_part, split
from galvatron.parallelize.sharding.fsdp import _face

Function = Callable[..., Any]
Error = Callable[[Function], Function]


def given(change: Function, place: int = 0) -> Error:
    """``change`` of the tensor, or of that at ``place``, which the right one gives."""

    def error(right: Function) -> Function:
        def wrong(*args: Any, **kwargs: Any) -> Any:
            given = right(*args, **kwargs)
            if given is None or isinstance(given, Tensor):
                return None if given is None else change(given)
            return *given[:place], change(given[place]), *given[place + 1 :]

        return wrong

    return error


def taken(change: Function, place: int = 0) -> Error:
    """The right one of a ``change`` of its argument at ``place``."""
    return lambda right: lambda *args: right(*args[:place], change(args[place]), *args[place + 1 :])


def half(x: Tensor) -> Tensor:
    return x / 2


def other_rank_s(x: Tensor) -> Tensor:
    """Of two parts along the first dim, each in the other's place."""
    return x.roll(len(x) // 2, 0)


def other_positions(x_BS: Tensor) -> Tensor:
    """The same along the second."""
    return x_BS.roll(x_BS.shape[1] // 2, 1)


def next_row_s(x: Tensor) -> Tensor:
    return x.roll(1, 0)


def never(_: Function) -> Function:
    return lambda *_, **__: None


def own_alone(_: Function) -> Function:
    """This rank's gradient, without the other's of the same."""
    return lambda ctx, grad: (grad, None)


def own_positions_alone(_: Function) -> Function:
    """This rank's gradient of its part, without the other's of the same."""
    return lambda ctx, grad: (split(grad, ctx.axes)[ctx.axes.rank], None)


def own_rows_alone(_: Function) -> Function:
    return lambda ctx, grad: (grad.chunk(2)[ctx.axes.rank], None)


def of_messages(parts: int, change: Function, place: int) -> Error:
    """``change`` of a gradient that comes home, of messages of so many parts."""

    def error(right: Function) -> Function:
        def wrong(*args: Any) -> Any:
            _, *grads = right(*args)
            if len(grads) == parts:
                grads[place] = change(grads[place])
            return None, *grads

        return wrong

    return error


def own_log_sum(right: Function) -> Function:
    def wrong(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, _: Tensor, __: Tensor, scale: float, **mask: Any) -> Any:
        return right(grad, q, k, v, *attend(q, k, v, scale, **mask), scale, **mask)

    return wrong


def one_hop_too_far(right: Function) -> Function:
    def wrong(*args: Any) -> Any:
        of_query, of_key, *others = right(*args)
        ring = Ring.of(*args[-7:])
        return of_query, of_key if ring.size == 1 else ring.pass_on(of_key).wait(), *others

    return wrong


def filled_with_ones(right: Function) -> Function:
    return lambda x, lengths: right(x, lengths, value=float(is_in_backward()))


def counts_of_this_rank(_: Function) -> Function:
    def wrong(_: Any, spread: Any) -> None:
        spread.total = spread.carried.clone()

    return wrong


def of_this_rank(right: Function) -> Function:
    def wrong(loads: Any, rate: float) -> None:
        loads.stage = None
        right(loads, rate)

    return wrong


def last_microbatch_alone(right: Function) -> Function:
    def wrong(slot: Any, gradient: Tensor) -> None:
        slot._is_filled = False
        right(slot, gradient)

    return wrong


def others_constant(right: Function) -> Function:
    """As ``torch.distributed.all_gather`` gives it."""

    def wrong(x_1BD: Tensor, axes: Any) -> Tensor:
        gathered = right(x_1BD.detach(), axes)
        own = torch.arange(axes.size).repeat_interleave(x_1BD.shape[1]) == axes.rank
        return torch.where(own[None, :, None], x_1BD.repeat(1, axes.size, 1), gathered)

    return wrong


def each_as_if_alone(right: Function) -> Function:
    return lambda parameters, device: right([replace(parameter, replicas=1) for parameter in parameters], device)


def without_copies(right: Function) -> Function:
    return lambda replicated: right(replace(replicated, cut=()))


def padding_learns(right: Function) -> Function:
    def wrong(embedding: Any, *args: Any, **kwargs: Any) -> None:
        right(embedding, *args, **kwargs)
        embedding.padding_idx = None

    return wrong


def without_mask(right: Function) -> Function:
    return lambda *args, **kwargs: right(*args, **{**kwargs, "mask": None})


def without_documents(right: Function) -> Function:
    return lambda *args: right(*args[:7], None, *args[8:])


def of_half_in_backward(right: Function) -> Function:
    def wrong(forward: Function, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        def again(x: Tensor, *rest: Any, **named: Any) -> Any:
            return forward(x * (0.5 if is_in_backward() else 1.0), *rest, **named)

        return right(again, hidden, *args, **kwargs)

    return wrong


def notes_again(right: Function) -> Function:
    def wrong(balance: Any, microbatch: int) -> Any:
        spread = right(balance, microbatch)
        balance._notes = True
        return spread

    return wrong


def then(change: Callable[[Any], Any]) -> Error:
    """The right one of a sharded unit, first, and then a ``change`` of how FSDP2 treats it."""

    def error(right: Function) -> Function:
        def wrong(unit: Any, *args: Any, **kwargs: Any) -> None:
            right(unit, *args, **kwargs)
            change(_face(unit))

        return wrong

    return error


def shards_alone(right: Function) -> Function:
    def wrong(root: Any, units: Any, **kwargs: Any) -> None:
        right(root, units, **kwargs)
        for unit in units:
            _face(unit).set_requires_all_reduce(False, recurse=False)

    return wrong


def kept_by_none(right: Function) -> Function:
    """Where a product is added to is a copy."""

    def wrong(*args: Any) -> Function:
        gradient = right(*args)
        return lambda: gradient().clone()

    return wrong


def same_in_backward(right: Function) -> Function:
    """A sum whose backward hands on what a rank is given, as Megatron's does where all are given the same."""
    return lambda tp, x: x + (right(tp, x) - x).detach()


class OwnOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: AxisGroup) -> Tensor:
        ctx.axes = axes
        return own_part(x, axes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return join(all_gather(grad, ctx.axes), ctx.axes), None


def of_all_parts(_: Function) -> Function:
    """The gradient of all parts on every rank, which are summed afterwards."""
    return lambda x, axes: x if axes.size == 1 else OwnOfAll.apply(x, axes)


def hidden_alone(right: Function) -> Function:
    return lambda outputs, gradients: right(outputs[:1], gradients[:1])
