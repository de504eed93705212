"""Which of the modules around its layers a stage of whole sequences has, and by which of their names."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from galvatron.models import Family, score_table

from .stage import Stage


def nth_stack(stage: Stage, index: int) -> int:
    """Which stack layer ``index`` is of."""
    return next(nth for nth, stack in enumerate(stage.family.stacks) if stack is stage.chain[index].stack)


def has_entry(stage: Stage, path: str) -> bool:
    """Whether the stage runs the module at ``path``, which runs before some stack: where the last one ends."""
    at = next((nth for nth, stack in enumerate(stage.family.stacks) if path in stack.joined), 0)
    stack = stage.family.stacks[at]
    follows = next(index for index, link in enumerate(stage.chain) if link.stack is stack) - 1 if at else -1
    return (stage.is_first or stage.layers.start <= follows) and follows < stage.layers.stop


def score_table_of(stage: Stage) -> tuple[str, nn.Module] | None:
    """If the stage begins within a stack whose first layer makes a bias of scores for all: its table and maker."""
    if stage.is_first or not stage.layers:
        return None
    link = stage.chain[stage.layers.start]
    first = next(other.path for other in stage.chain if other.stack is link.stack)
    found = score_table(stage.model.get_submodule(first)) if first != link.path and link.stack.biased else None
    return None if found is None else (f"{first}.{found[0]}", found[1])


def tables_of(stage: Stage, owned: Collection[int]) -> list[nn.Embedding]:
    """The embeddings of the vocabulary among the modules of the ids ``owned``, which share a weight."""
    if stage.family.embedding is None:
        return []
    weight = stage.model.get_submodule(stage.family.embedding).weight
    tables = [m for m in stage.model.modules() if isinstance(m, nn.Embedding) and m.weight is weight]
    return [table for table in tables if id(table) in owned]


def paths_of(stage: Stage, owned: Collection[int]) -> dict[str, str]:
    """Of parameters that have several names, from the first one to the one within the modules of the ids ``owned``."""
    first: dict[int, str] = {}
    paths: dict[str, str] = {}
    for name, parameter in stage.model.named_parameters(remove_duplicate=False):
        usual = first.setdefault(id(parameter), name)
        if name != usual and id(stage.model.get_submodule(name.rpartition(".")[0])) in owned:
            paths.setdefault(usual, name)
    return paths


class Bare(nn.Module):
    """Parameters that only a module around the layers has (CLIP's temperature), or that none uses, which are not
    trained: a unit of their own; without a ``family`` it has none."""

    def __init__(self, model: nn.Module, family: Family | None) -> None:
        super().__init__()
        names = () if family is None else family.loose
        self._owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        for nth, (owner, name) in enumerate(self._owners):
            self.register_parameter(str(nth), getattr(owner, name))
        for name in () if family is None else family.unused:
            model.get_parameter(name).requires_grad_(False)

    def place(self) -> None:
        """Let the modules around the layers see what this holds."""
        for nth, (owner, name) in enumerate(self._owners):
            setattr(owner, name, getattr(self, str(nth)))
