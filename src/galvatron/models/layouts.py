"""How the linears of a layer can be cut: which is a column, which a row, and in what order heads lie in a column.

Takes the calls of one layer in one forward pass, with their autograd graph; gives regions.  A linear that another
column or attention feeds is a row; what feeds a row is a column.  An output of a column belongs to the heads of the
row's inputs that its value reaches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from galvatron.core.family import Blocks, Experts, Region, around

from .trace import Call


@dataclass(frozen=True)
class _Feeds:
    """What a tensor is made from: linears of the layer, and whether attention lies between."""

    linears: tuple[Call, ...]
    attends: bool


def regions_of(layer: Call, calls: list[Call], prefix: str, heads: int, side: str | None) -> tuple[Region, ...]:
    """The regions of a layer, of which ``calls`` are within; () where some row fits no rule.

    ``side``: the argument that holds what another stack ends with.
    """
    entering = {layer.argument.grad_fn, *(tensor.grad_fn for tensor in layer.named.values())}
    other = None if side is None else layer.named.get(side)
    linears = [call for call in calls if call.is_linear]
    feeds = {call.name: _feeds(call.argument, linears, entering) for call in linears}
    rows, columns = _rows_and_columns(linears, feeds)
    found = []
    for row in rows:
        own = [call for call in feeds[row.name].linears if call.name in columns]
        region = _region(row, own, calls, prefix, heads if feeds[row.name].attends else None, other, layer)
        if region is None:
            return ()
        found.append(region)
    return tuple(found)


def _rows_and_columns(linears: list[Call], feeds: dict[str, _Feeds]) -> tuple[list[Call], set[str]]:
    """What can be cut; the others stay whole: what a column of attention is made from (latent states), and what feeds
    no row (gates, routers)."""
    attending = [call for call in linears if feeds[call.name].attends]
    sources = {call.name for row in attending for call in feeds[row.name].linears}
    latent = {call.name for name in sources for call in feeds[name].linears if not feeds[name].attends}
    rows: list[Call] = []
    columns: set[str] = set()
    for call in linears:
        made_from = feeds[call.name]
        if made_from.attends or any(other.name in columns - sources for other in made_from.linears):
            rows.append(call)
        elif call.name not in latent:
            columns.add(call.name)
    return rows, columns


def experts_of(layer: nn.Module, calls: list[Call], prefix: str, hidden: int) -> Experts | None:
    """The experts of a layer: two stacks of matrices in one module, perhaps with biases, and the router beside; None
    where there are none.

    Of every matrix the side that is not of hidden states is cut, and a bias of that side; the larger has a gate's units
    too, before the others or each beside its own.
    """
    found = []
    for name, module in layer.named_modules():
        own = dict(module.named_parameters(recurse=False))
        matrices = [p for p in own.values() if p.dim() == 3]
        beside = [p for p in own.values() if p.dim() != 3]
        if (
            len(matrices) == 2
            and all(hidden in p.shape[1:] for p in matrices)
            and all(p.dim() == 2 and len(p) == len(matrices[0]) for p in beside)
        ):
            found.append((name, module, own))
    if len(found) != 1:
        return None
    name, module, own = found[0]
    dims = {key: 2 if p.dim() == 3 and p.shape[1] == hidden else 1 for key, p in own.items()}
    dims = {key: dim for key, dim in dims.items() if own[key].shape[dim] != hidden}
    width = min(own[key].shape[dim] for key, dim in dims.items())
    in_order = getattr(module, "is_concatenated", True)
    count = next(iter(own.values())).shape[0]
    routers = [call.name for call in calls if call.output.shape[-1] == count and _has_rows(call.module, count)]
    if len(routers) != 1:
        return None
    cuts = {key: (dim, own[key].shape[dim] // width if in_order else 1) for key, dim in dims.items()}
    router, after = routers[0].removeprefix(prefix), _beside(calls, prefix + name, prefix)
    return Experts(module=name, router=router, cuts=cuts, beside=after)


def _beside(calls: list[Call], experts: str, prefix: str) -> str | None:
    """What the block around ``experts`` hands its own argument to after them; None unless that is one module."""
    names = [call.name for call in calls]  # in the order in which calls end
    around = experts.rpartition(".")[0]
    if not {experts, around} <= set(names):
        return None
    entering = calls[names.index(around)].argument
    later = calls[names.index(experts) + 1 :]
    found = [c.name for c in later if c.name.rpartition(".")[0] == around and c.argument is entering]
    return found[0].removeprefix(prefix) if len(found) == 1 else None


def _has_rows(module: nn.Module, rows: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] == rows


def _feeds(tensor: Tensor, linears: list[Call], entering: Iterable[object]) -> _Feeds:
    """Walk the graph of ``tensor`` back to the outputs of linears."""
    ends = {call.output.grad_fn: call for call in linears}
    seen: set[object] = set(entering)
    waiting: list[Any] = [tensor.grad_fn]
    found, attends = [], False
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in ends:
            found.append(ends[node])
            continue
        attends = attends or "Softmax" in node.name()
        waiting += [following for following, _ in node.next_functions]
    return _Feeds(tuple(call for call in linears if call in found), attends)


def _region(
    row: Call,
    columns: list[Call],
    calls: list[Call],
    prefix: str,
    heads: int | None,
    side: Tensor | None,
    layer: Call,
) -> Region | None:
    if len({column.name for column in columns}) < len(columns):
        return None  # a linear that runs twice: of tokens, and of what they are to each other
    norms = {call.name: (call, column) for call in calls for column in columns if _is_wide_norm(call, column)}
    reached = {}
    for column in columns:
        end = next((call for call, of in norms.values() if of is column), column)
        reached[column.name] = end.output
    touches = _influence(row.argument, list(reached.values()))
    layouts = {}
    for column, touched in zip(columns, touches, strict=True):
        layout = _layout(touched, heads)
        if layout is None:
            return None
        layouts[column.name] = layout
    entries, flat = _entries(row, columns, calls, prefix)
    inner = [call.argument for call in calls if call.name in entries]
    strip, numbers = len(prefix), _numbers_by_head(row, entries, calls, prefix, heads)
    is_usual = [name[strip:] for name in entries] == [around(name[strip:] for name in (*layouts, row.name))]
    return Region(
        entries=() if is_usual else tuple(name[strip:] for name in entries),
        columns={name[strip:]: layout for name, layout in layouts.items()},
        row=row.name[strip:],
        wide_norms={name[strip:]: layouts[column.name][0] for name, (_, column) in norms.items()},
        by_head={call.name[strip:]: layouts[of.name][0] for call in calls for of in _heads_of(call, columns)}
        | dict.fromkeys(numbers, "heads"),
        by_head_dims={name: dim for name, dim in numbers.items() if dim},
        flat=flat,
        windows=any(entered.dim() > 2 and entered.shape[:2] != layer.argument.shape[:2] for entered in inner),
        sides=_sides([call for call in calls if call.name in entries], side),
        head_inputs=_head_inputs([call for call in calls if call.name in entries], heads),
    )


def _head_inputs(entries: list[Call], heads: int | None) -> dict[str, int]:
    """Arguments that have a dim of heads, or of samples and heads: the first or the second of three or four."""
    found = {}
    count = heads or 1
    for call in entries if count > 1 else ():
        counts = (count, count * call.argument.shape[0])
        for name, tensor in call.named.items():
            dims = [dim for dim in (0, 1) if tensor.dim() > 2 and tensor.shape[dim] in counts]
            if dims and tensor.shape != call.argument.shape:
                found[name] = dims[0]
    return found


def _sides(entries: list[Call], side: Tensor | None) -> tuple[str, ...]:
    names = {name: None for call in entries for name, tensor in call.named.items() if tensor is side}
    return tuple(names)


def _heads_of(call: Call, columns: list[Call]) -> list[Call]:
    """The column whose outputs enter a module that has parameters of its own for every head; [] if it is none."""
    weight = getattr(call.module, "weight", None)
    if (
        call.is_linear
        or not isinstance(weight, Tensor)
        or weight.dim() != 2
        or call.argument.shape[-2:] != weight.shape
    ):
        return []
    return list(_feeds(call.argument, columns, ()).linears)


def _numbers_by_head(
    row: Call, entries: list[str], calls: list[Call], prefix: str, heads: int | None
) -> dict[str, int]:
    """Parameters with an entry a head, and in which dim, of modules around an attention that multiply by none: sinks,
    scales, tables of biases."""
    around = {row.name.rpartition(".")[0], *entries}
    found = {}
    for call in calls if heads is not None else ():
        for path, value in call.module.named_parameters() if call.name in around else ():
            dims = [dim for dim, size in enumerate(value.shape) if size == heads]
            if len(dims) == 1 and path.rpartition(".")[2] not in ("weight", "bias"):
                found[f"{call.name}.{path}"[len(prefix) :]] = dims[0]
    return found


def _is_wide_norm(call: Call, column: Call) -> bool:
    """A norm that the whole output of a column enters."""
    weight = getattr(call.module, "weight", None)
    if call.is_linear or not isinstance(weight, Tensor) or isinstance(call.module, nn.Embedding):
        return False
    return weight.shape == column.output.shape[-1:] and _comes_from(call.argument, column.output)


def _comes_from(tensor: Tensor, source: Tensor) -> bool:
    return tensor is source or tensor.grad_fn is source.grad_fn


def _influence(inputs: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """For every tensor of ``outputs``: [last dim of ``inputs``, its own last dim], whether it reaches them."""
    rows: list[list[Tensor]] = [[] for _ in outputs]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(inputs.shape[:-1], generator=generator)
    for index in range(inputs.shape[-1]):
        gradients = torch.autograd.grad(
            (inputs[..., index] * noise).sum(), outputs, retain_graph=True, allow_unused=True
        )
        for kept, gradient, output in zip(rows, gradients, outputs, strict=True):
            found = torch.zeros_like(output) if gradient is None else gradient
            kept.append(found.flatten(0, -2).abs().amax(dim=0) > 0)
    return [torch.stack(kept) for kept in rows]


def _layout(touched: Tensor, heads: int | None) -> tuple[Blocks, ...] | None:
    """The blocks of every segment of a column, from what its outputs touch; None where they lie in no such order."""
    if heads is None:
        return _segments(touched, {touched.shape[0]: "ffn"})
    by_head = touched.unflatten(0, (heads, -1)).any(dim=1)
    fine = _segments(by_head, {1: "kv_head", heads // 2: "kv_heads", heads: "heads"})
    return fine or _segments(by_head.unflatten(0, (heads // 2, 2)).any(dim=1), {heads // 2: "kv_heads"})


def _segments(touched: Tensor, names: dict[int, Blocks]) -> tuple[Blocks, ...] | None:
    """``touched``: [blocks of the row, outputs].  Outputs that touch equal blocks are a block, or several; a segment
    ends where the next block touches earlier ones."""
    owners = [tuple(column.nonzero().flatten().tolist()) for column in touched.t()]
    if any(not owner or owner != tuple(range(owner[0], owner[-1] + 1)) for owner in owners):
        return None
    lengths = [(owner, len(list(members))) for owner, members in itertools.groupby(owners)]
    width = min(length for _, length in lengths)
    if any(length % width for _, length in lengths):
        return None
    runs = [owner for owner, length in lengths for _ in range(length // width)]
    segments: list[list[tuple[int, ...]]] = []
    for run in runs:
        if not segments or run[0] <= segments[-1][-1][0]:
            segments.append([])
        segments[-1].append(run)
    found = []
    for segment in segments:
        count, total = len(segment), touched.shape[0]
        share = [tuple(range(i * total // count, (i + 1) * total // count)) for i in range(count)]
        if count not in names or segment != share:
            return None
        found.append(names[count])
    return tuple(found)


def _entries(row: Call, columns: list[Call], calls: list[Call], prefix: str) -> tuple[list[str], bool]:
    """Where the sequence is gathered: the smallest module around the columns that the layer hands hidden states to."""
    around = _common([call.name for call in columns], prefix)
    if len(columns) == 1:  # a module around column and row views its input's shape
        around = _common([columns[0].name, row.name], prefix) or columns[0].name
    named = {call.name: call for call in calls}
    entries = [around] if around in named else [call.name for call in columns]
    return entries, all(named[name].argument.dim() == 2 for name in entries)


def _common(names: list[str], prefix: str) -> str:
    """The path of the innermost module around ``names`` within the layer; '' for the layer itself."""
    parts = [name[len(prefix) :].split(".")[:-1] for name in names]
    shared = [steps[0] for steps in zip(*parts, strict=False) if len(set(steps)) == 1]
    return prefix + ".".join(shared) if shared else ""
