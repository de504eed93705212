"""One model chunk of a stage whose ends see whole sequences: the model's own forward runs all of it.

What other stages own stays where it is, without parameters: their layers pass hidden states on, or end the forward
after this stage's last, and what comes before the layers gives zeros of the right shape.  Between layers hidden states
are [B/dp, S/sp, H] chunks; before and after them every tensor-parallel rank has whole sequences of its batch rows, does
all of the work, and what it does is summed over tensor parallelism like any gradient.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from galvatron.core.model import ParameterSpec
from galvatron.internals import tree_map_only
from galvatron.models import Family, Reached, emptied
from galvatron.plan import LayerStrategy

from ..layers.forward import wrap_forward
from ..layers.randomness import AlikeMasks
from ..layers.sides import OwnSide
from ..losses.contrast import contrast_share
from ..losses.fused import PLAIN, LossTerms
from ..losses.own import LossFunction, own_loss_share
from ..losses.samples import right_share, sample_loss_share
from ..processes.collectives import ALONE, AxisGroup, gather_sequence, own_part
from .passes import Inbox
from .stage import Stage


class WholeStage(Stage):
    """A part of a model, from its inputs or hidden states to hidden states or loss."""

    _labels: tuple[Tensor, float, LossTerms, LossFunction | None]
    bare: Bare
    pairs: AxisGroup = ALONE
    """The ranks that have the batch's other pairs, where it is contrasted."""

    def _leave_others(self) -> None:
        model = self.model
        for index, link in enumerate(self.chain):
            if index not in self.layers:
                ends = index == self.layers.stop
                self.layer(index).forward = _end if ends else partial(_pass_on, link.stack.outputs)
        if not self.is_first:
            for module in self.first_modules:
                module.forward = _Zeros(module)
        owners = [self.layer(index) for index in self.layers]
        owners += self.first_modules if self.is_first else ()
        owners += self.last_modules if self.is_last else ()
        owned = {id(module) for owner in owners for module in owner.modules()}
        self._paths = self._owned_paths(owned)
        self._sides: dict[LayerStrategy, OwnSide] = {}
        object.__setattr__(self, "bare", Bare(self.model, self.family.bare if self.is_last else ()))
        self.masks, self._before = AlikeMasks(), ALONE
        for module in model.modules():
            if id(module) not in owned:
                emptied(module)
        self.bare.place()
        takes = inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in takes else {}

    @property
    def first_paths(self) -> tuple[str, ...]:
        """Where the modules before the layers are that have the parameters."""
        return self.family.before

    @property
    def last_paths(self) -> tuple[str, ...]:
        """The same after the layers, the head last."""
        return (*self.family.after, *([self.family.head] if self.family.head else []))

    @property
    def tables(self) -> list[nn.Embedding]:
        """The embeddings of the vocabulary that this stage has, which share a weight."""
        if self.family.embedding is None:
            return []
        weight = self.model.get_submodule(self.family.embedding).weight
        return [m for m in self.model.modules() if isinstance(m, nn.Embedding) and m.weight is weight]

    def _owned_paths(self, owned: set[int]) -> dict[str, str]:
        """Of parameters that have several names, from the first one to the one within this stage's modules."""
        first: dict[int, str] = {}
        paths: dict[str, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            usual = first.setdefault(id(parameter), name)
            if name != usual and id(self.model.get_submodule(name.rpartition(".")[0])) in owned:
                paths.setdefault(usual, name)
        return paths

    def placed(self, parameter: ParameterSpec) -> ParameterSpec:
        """``parameter`` of an end by the path where this stage has it, which a tied one has several of."""
        is_here = self.model.get_parameter(parameter.name).numel() > 0
        return parameter if is_here else parameter.model_copy(update={"name": self._paths[parameter.name]})

    def position_tables(self) -> list[nn.Embedding]:
        """None: positions are looked up for whole sequences."""
        return []

    def enter_from_whole(self, index: int, sequence: AxisGroup) -> None:
        """Let layer ``index``, the first of a stack, begin with this rank's part of whole sequences."""
        if index == 0:
            self._before = sequence

        def own(whole: Tensor) -> Tensor:
            self.masks.draw_for(None)
            return own_part(whole, axes=sequence)

        wrap_forward(self.layer(index), lambda forward, *args, **kwargs: _call(forward, own, args, kwargs))

    def leave_whole(self, index: int, change: Callable[[Tensor], Tensor], sequence: AxisGroup) -> None:
        """Let layer ``index``, the last of a stack, end with whole sequences, after a ``change`` of layout."""

        def whole(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            hidden, *others = output if isinstance(output, tuple) else (output,)
            hidden = gather_sequence(change(hidden), sequence)
            self.masks.draw_for(1 + index, sequence)
            return (hidden, *others) if isinstance(output, tuple) else hidden

        wrap_forward(self.layer(index), whole)

    def side_of(self, strategy: LayerStrategy, sequence: AxisGroup, change: Callable[[Tensor], Tensor]) -> OwnSide:
        """What layers of ``strategy`` see of other stacks' states: one for all of them."""
        if strategy not in self._sides:
            self._sides[strategy] = OwnSide(sequence, change)
        return self._sides[strategy]

    def end_at_head(self) -> None:
        """End the forward with the loss that the vocabulary's projection gives; after FSDP2 has its hooks there."""
        if self.is_last and self.family.head is not None:
            head = self.last_modules[-1]
            wrap_forward(head, self._loss_of_tokens)
            head.register_forward_hook(_end_with_output)

    def forward(  # type: ignore[override]
        self,
        received: Inbox | Tensor | None,
        inputs: Mapping[str, Tensor],
        labels: Tensor | None = None,
        weight: float = 1.0,
        loss_fn: LossFunction | None = None,
        terms: LossTerms = PLAIN,
        *,
        scores: bool = False,
    ) -> Tensor:
        """Run the stage.

        Args:
            received: hidden states from the stage before; None on the first.
            inputs: what the model's forward takes, of this rank's batch rows of the embedding's layout; on later
                stages for shapes and masks alone.
            labels: on the last stage int64 [B/dp, S] of the head's layout, or [B/dp] where samples have classes.
            weight: what a label's loss counts for in the global loss.
            loss_fn: the loss of labels, in place of cross entropy.
            terms: what cross entropy is made of.
            scores: whether to count also what is told right, where samples have classes.

        Returns:
            The hidden chunk for the next stage, or this rank's share of the loss (float32 scalar; of loss and what is
            told right [2]).
        """
        self._received = received
        if labels is not None:
            self._labels = labels, weight, terms, loss_fn
        if self.is_first:
            self.masks.draw_for(0, self._before)
        try:
            outputs = self.model(**inputs, **self._options)
        except Reached as reached:
            value: Tensor = reached.value
            return value
        finally:
            self.masks.draw_for(None)
        assert labels is not None
        if self.family.task == "contrast":
            bias = getattr(self.model, "logit_bias", None)
            share = contrast_share(outputs, self.model.logit_scale, bias, weight, self.pairs)  # type: ignore[arg-type]
            return share / self.head_tp.size
        share = sample_loss_share(outputs.logits, labels, weight, terms, loss_fn, self.head_tp)
        return torch.stack((share, right_share(outputs.logits, labels, weight, self.head_tp))) if scores else share

    def _loss_of_tokens(self, head: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        labels, weight, terms, loss_fn = self._labels
        if loss_fn is None:
            return head(hidden, labels, weight, self._terms(terms))
        logits = self.logit_terms.logits(head(hidden)).flatten(0, 1)
        return own_loss_share(loss_fn, logits, labels.flatten(), self.model.config.vocab_size, weight, self.head_tp)


def stage_of(model: PreTrainedModel, family: Family, layers: range, *, is_first: bool, is_last: bool) -> Stage:
    """The stage of ``layers``, of either kind of ends."""
    kind = Stage if family.ends == "tokens" else WholeStage
    return kind(model, family, layers, is_first=is_first, is_last=is_last)


class Bare(nn.Module):
    """Parameters that only a module around the layers has (CLIP's temperature): a unit of their own."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self._owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        for owner, name in self._owners:
            self.register_parameter(name, getattr(owner, name))

    def place(self) -> None:
        """Let the modules around the layers see what this holds."""
        for owner, name in self._owners:
            setattr(owner, name, getattr(self, name))


class _Zeros:
    """Gives zeros of the shapes that a module's outputs have, in no memory; found by running a copy on meta."""

    def __init__(self, module: nn.Module) -> None:
        self._twin = copy.deepcopy(module).to("meta")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        devices: list[torch.device] = []
        tree_map_only(Tensor, lambda given: devices.append(given.device), (args, kwargs))
        args, kwargs = tree_map_only(Tensor, lambda given: given.to("meta"), (args, kwargs))
        with torch.no_grad():
            outputs = self._twin(*args, **kwargs)
        return tree_map_only(
            Tensor, lambda made: torch.zeros((), dtype=made.dtype, device=devices[0]).expand(made.shape), outputs
        )


def _call(forward: Callable[..., Any], change: Callable[[Tensor], Tensor], args: Any, kwargs: Any) -> Any:
    if args:
        return forward(change(args[0]), *args[1:], **kwargs)
    return forward(**{**kwargs, "hidden_states": change(kwargs["hidden_states"])})


def _hidden(args: Any, kwargs: Any) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _pass_on(outputs: int, *args: Any, **kwargs: Any) -> Any:
    """What a layer of another stage gives: the hidden states that it takes."""
    hidden = _hidden(args, kwargs)
    return (hidden, *(None,) * (outputs - 1)) if outputs else hidden


def _end(*args: Any, **kwargs: Any) -> None:
    raise Reached(_hidden(args, kwargs))


def _end_with_output(module: nn.Module, args: Any, output: Tensor) -> None:
    raise Reached(output)
