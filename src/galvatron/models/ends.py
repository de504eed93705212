"""What has parameters and runs before and after the layers: two kinds of ends (``core.family.Family.ends``).

Takes a twin and the calls of its forward pass; gives paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .trace import Call


@dataclass(frozen=True)
class Around:
    """Paths of the outermost modules with parameters that run before and after the layers.

    ``embedding``: the table of the vocabulary, within ``before``; ``head``: the projection to it, beside ``after``.
    What runs between stacks is ``before``.
    ``bare``: parameters that no such module has.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    embedding: str | None
    head: str | None
    bare: tuple[str, ...]


def around(
    model: PreTrainedModel, stacks: Sequence[nn.ModuleList], calls: list[Call], *, to_words: bool, tower: str | None
) -> Around:
    """The modules around ``stacks``; ``to_words``: whether the head's output are logits of the vocabulary.

    ``tower``: a module that runs as one, whatever is within.
    """
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings() if to_words else None
    table = _table(model)
    layers = [names[id(stack)] + "." for stack in stacks]
    apart = [*layers, *([names[id(head)] + "."] if isinstance(head, nn.Linear) else [])]
    first = next(i for i, call in enumerate(calls) if call.module is stacks[-1][0])
    before: dict[str, None] = {}
    after: dict[str, None] = {}
    for index, call in enumerate(calls):
        path = call.name + "."
        if any(path.startswith(part) or part.startswith(path) for part in apart) or not list(call.module.parameters()):
            continue
        is_within = tower is not None and path.startswith(tower + ".")
        (before if index < first else after).setdefault(tower if is_within else call.name)  # type: ignore[arg-type]
    outer = [_outermost(list(found)) for found in (before, after)]
    owned = {id(p) for path in (*outer[0], *outer[1]) for p in model.get_submodule(path).parameters()}
    owned |= {id(p) for p in head.parameters()} if isinstance(head, nn.Linear) else set()
    bare = (n for n, p in model.named_parameters() if id(p) not in owned and not n.startswith(tuple(layers)))
    tables = (call.name for call in calls if _looks_up(call.module, table))
    return Around(
        before=tuple(outer[0]),
        after=tuple(outer[1]),
        embedding=next(tables, None),
        head=names[id(head)] if isinstance(head, nn.Linear) else None,
        bare=tuple(bare),
    )


def joints_of(
    model: PreTrainedModel, stacks: Sequence[nn.ModuleList], calls: list[Call], before: Sequence[str]
) -> list[dict[str, Any]]:
    """Of every stack, what ``core.family.Stack`` has of the way to it, ``joined``, and ``pooled``.

    What makes the first stack's input is on the way to it; all else goes with the stack that it runs before, and so
    does what autograd knows nothing of (positions that are not learnt).
    """
    first = {id(call.module): call for call in reversed(calls)}
    places = {id(call.module): place for place, call in reversed(list(enumerate(calls)))}
    modules = {path: model.get_submodule(path) for path in before}
    starts = [first[id(stack[0])] for stack in stacks]
    found: list[dict[str, Any]] = [{} for _ in stacks]
    makers, begin = makers_of(starts[0].argument), places[id(stacks[0][0])]
    made = {path: first[id(module)].output.grad_fn for path, module in modules.items() if id(module) in first}
    left = [p for p, by in made.items() if by not in makers and (by is not None or places[id(modules[p])] > begin)]
    for nth, (stack, start) in enumerate(zip(stacks, starts, strict=True)):
        if nth == 0:
            continue
        joined = [path for path in left if places[id(modules[path])] < places[id(stack[0])]]
        left = [path for path in left if path not in joined]
        found[nth]["joined"] = tuple(joined)
        ends = {first[id(layer)].output.grad_fn for layer in stacks[nth - 1]}
        taken = set().union(*(makers_of(tensor) for tensor in (start.argument, *start.named.values())))
        if not ends & taken:
            of_tower = [path for path in joined if ends & makers_of(first[id(modules[path])].output)]
            found[nth - 1]["pooled"] = max(of_tower, key=lambda path: places[id(modules[path])], default=None)
    return found


def makers_of(tensor: Tensor) -> set[Any]:
    """All that autograd knows to have made ``tensor``."""
    waiting, seen = [tensor.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return seen


def _looks_up(module: nn.Module, table: nn.Module | None) -> bool:
    """Whether it is the embedding ``table``, or shares its weight."""
    return isinstance(module, nn.Embedding) and module.weight is getattr(table, "weight", None)


def _table(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # of models that see two kinds of inputs
        return None


def _outermost(paths: list[str]) -> list[str]:
    return [path for path in paths if not any(path.startswith(other + ".") for other in paths)]
