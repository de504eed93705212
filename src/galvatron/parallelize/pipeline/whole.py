"""One model chunk of a stage whose ends see whole sequences: the model's own forward runs all of it.

What other stages own stays where it is, without parameters: their layers pass hidden states on, or end the forward
after this stage's last, and what comes before the layers gives zeros of the right shape.  Between layers hidden states
are [B/dp, S/sp, H] chunks; before and after them every tensor-parallel rank has whole sequences of its batch rows, does
all of the work, and what it does is summed over tensor parallelism like any gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from galvatron.core.model import ParameterSpec
from galvatron.internals import record_layers_alone
from galvatron.models import Family, Reached, argument_names, arguments_by_name, emptied
from galvatron.models.chain import SCORE_BIAS
from galvatron.models.grids import PIXELS
from galvatron.plan import LayerStrategy

from ..layers.forward import wrap_forward
from ..layers.randomness import AlikeMasks
from ..layers.sides import OwnSide
from ..losses.contrast import pairs_of
from ..losses.fused import PLAIN, LossTerms
from ..losses.own import LossFunction, own_loss_share
from ..losses.samples import right_share, sample_loss_share
from ..processes.collectives import ALONE, AxisGroup, own_part, whole_sequence
from .images import see_something
from .owned import Bare, has_entry, nth_stack, paths_of, score_table_of, tables_of
from .passes import Inbox, Outputs
from .stage import Stage
from .standins import Zeros, call_with, end_with, hidden_of, pass_on

SIDE = "side"
"""What rides along with hidden states: the states that another stack ends with."""


class WholeStage(Stage):
    """A part of a model, from its inputs or hidden states to hidden states or loss."""

    _labels: tuple[Tensor, float, LossTerms, LossFunction | None]
    _has_images = False
    bare: Bare
    pairs: AxisGroup = ALONE
    """The ranks that have the batch's other pairs, where it is contrasted."""
    compute_dtype = torch.float32
    """What layers compute in."""

    def _leave_others(self) -> None:
        model = self.model
        record_layers_alone(model, [self.layer(index) for index in self.layers])
        self._entries = tuple(path for path in self.family.before if has_entry(self, path))
        self._riding: dict[str, Tensor] = {}
        self._sides: dict[int, OwnSide] = {}
        self._score_table = score_table_of(self)
        for index, link in enumerate(self.chain):
            if index not in self.layers:
                ends = index == self.layers.stop
                self.layer(index).forward = end_with if ends else partial(pass_on, link.stack.outputs)
        for path in self.family.before:
            if path not in self._entries:
                module = model.get_submodule(path)
                module.forward = Zeros(module, lambda: self.compute_dtype)
        owned = self._owned()
        self._paths, self._tables = paths_of(self, owned), tables_of(self, owned)
        object.__setattr__(self, "bare", Bare(self.model, self.family if self.is_last else None))
        self.masks, self._before = AlikeMasks(), ALONE
        for module in model.modules():
            if id(module) not in owned:
                emptied(module)
        self.bare.place()
        self._sees_images = self.family.tower in self._entries
        if self._sees_images:
            decoder = model.get_submodule(self.family.stacks[-1].path.rpartition(".")[0])
            see_something(model, decoder, lambda: self._has_images)
        takes = inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in takes else {}

    def _owned(self) -> frozenset[int]:
        """Ids of the modules whose parameters this stage has."""
        owners = [*map(self.layer, self.layers), *self.entry_modules, *(self.last_modules if self.is_last else ())]
        if self._score_table is not None:
            owners.append(self.model.get_submodule(self._score_table[0]))
        return frozenset(id(module) for owner in owners for module in owner.modules())

    @property
    def entry_modules(self) -> tuple[nn.Module, ...]:
        """Those of the embedding's modules that this stage has: at the beginning, and where stacks meet."""
        return tuple(map(self.model.get_submodule, self._entries))

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
        return self._tables

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
        received = index == self._received_in

        def own(hidden: Tensor) -> Tensor:
            self.masks.draw_for(None)
            return hidden if received else own_part(hidden, axes=sequence)

        wrap_forward(self.layer(index), lambda forward, *args, **kwargs: call_with(forward, own, args, kwargs))

    @property
    def _received_in(self) -> int | None:
        """The layer that begins with what was received; None where it comes from one whose states are recorded."""
        start = self.layers.start
        return None if self.is_first or self._follows_recorded else start

    @property
    def _follows_recorded(self) -> bool:
        """Whether what follows may take the states that this stage is sent from where a layer of another one ends."""
        start = self.layers.start
        return not self.is_first and self.chain[start].is_first and nth_stack(self, start) == nth_stack(self, start - 1)

    @property
    def _taken(self) -> int:
        """The layer in whose place a stage gives the states that it is sent, if what follows may take them."""
        before = range(self.layers.start)
        return next((index for index in reversed(before) if not self.chain[index].is_idle), before[-1])

    def draw_alike(self, index: int, tp: AxisGroup) -> None:
        """Let layer ``index``, of windows of whole sequences, draw what all ranks of ``tp`` draw."""
        place = 1 + len(self.chain) + index

        def alike(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self.masks.draw_for(place, tp)
            output = forward(*args, **kwargs)
            self.masks.draw_for(None)
            return output

        wrap_forward(self.layer(index), alike)

    def leave_whole(self, index: int, change: Callable[[Tensor], Tensor], sequence: AxisGroup) -> None:
        """Let layer ``index``, the last of a stack, end with whole sequences, after a ``change`` of layout."""

        def whole(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            hidden, *others = output if isinstance(output, tuple) else (output,)
            hidden = whole_sequence(change(hidden), sequence)
            self.masks.draw_for(1 + index, sequence)
            return (hidden, *others) if isinstance(output, tuple) else hidden

        wrap_forward(self.layer(index), whole)

    def side_of(self, strategy: LayerStrategy, sequence: AxisGroup, change: Callable[[Tensor], Tensor]) -> OwnSide:
        """What layers of ``strategy`` see of other stacks' states: one for all that cut sequences into as many parts.

        Of those that a stage before sends, if this one begins among such layers.
        """
        degree = strategy.sequence_degree
        if degree not in self._sides:
            is_sent = not self.is_first and self.chain[self.layers.start].stack.side is not None
            self._sides[degree] = OwnSide(sequence, change, self._side if is_sent else None)
        return self._sides[degree]

    def _side(self) -> Tensor:
        return self._riding[SIDE]

    def riding(self, index: int) -> tuple[str, ...]:
        """What comes with hidden states into layer ``index``: another stack's states, and what towers came to."""
        side = [SIDE] if self.chain[index].stack.side is not None else []
        towers = self.family.stacks[: nth_stack(self, index)]
        return (*side, *(tower.pooled for tower in towers if tower.pooled is not None))

    def meet_neighbours(self, whole_of: Callable[[int | None], AxisGroup]) -> None:
        """Begin with what the stage before sends, and end with what the next one takes; after layers have layouts.

        ``whole_of``: the ranks that see whole sequences of the same rows before and between stacks, of what enters a
        layer; None: of what rides along.
        """
        start, stop = self.layers.start, self.layers.stop
        pooled = {stack.pooled for stack in self.family.stacks if stack.pooled is not None}
        for path in pooled.intersection(self._entries):
            self.model.get_submodule(path).register_forward_hook(partial(self._ride, path))
        if self._follows_recorded:
            self.layer(self._taken).forward = lambda *_, **__: whole_sequence(self._open(), whole_of(start))
        elif not self.is_first:
            self.receive_in(self.layer(start))
        if not self.is_first:
            for path in pooled.intersection(self.riding(start)):
                self.model.get_submodule(path).forward = partial(self._ridden, path)
        if self._score_table is not None:
            self._give_scores(self._score_table[1])
        if not self.is_last:
            self.layer(stop).forward = partial(self._end, stop, whole_of(stop), whole_of(None))

    def _ride(self, path: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self._riding[path] = output

    def _ridden(self, path: str, *args: Any, **kwargs: Any) -> Tensor:
        return self._riding[path]

    def _give_scores(self, maker: nn.Module) -> None:
        """Let the first layer see the bias of scores that a layer of another stage makes, of this stage's table.

        Within the layer, so that FSDP2 does not take the layer for done when the bias is.
        """
        layer = self.layer(self.layers.start)
        place = argument_names(type(layer)).index(SCORE_BIAS)

        def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            tokens = hidden_of(args, kwargs).shape[1]  # of what stands for hidden states here: whole sequences
            bias = maker.compute_bias(tokens, tokens).unsqueeze(0)  # type: ignore[operator]
            if place < len(args):
                args = (*args[:place], bias, *args[place + 1 :])
            else:
                kwargs[SCORE_BIAS] = bias
            return forward(*args, **kwargs)

        wrap_forward(layer, call)

    def _end(self, index: int, sequence: AxisGroup, side: AxisGroup, *args: Any, **kwargs: Any) -> None:
        """In the place of layer ``index``, the next stage's first: end with what enters it."""
        link, hidden = self.chain[index], hidden_of(args, kwargs)
        if link.is_first:
            hidden = own_part(hidden, sequence)
        if link.stack.side is not None and SIDE not in self._riding:
            given = arguments_by_name(self.layer(index), args, kwargs)[link.stack.side]
            self._riding[SIDE] = own_part(given, side)
        raise Reached((hidden, *(self._riding[name] for name in self.riding(index))))

    def end_at_head(self) -> None:
        """End the forward with the loss that the vocabulary's projection gives; after FSDP2 has its hooks there."""
        if self.is_last and self.family.head is not None:
            head = self.last_modules[-1]
            wrap_forward(head, self._loss_of_tokens)
            head.register_forward_hook(_end_with_output)

    def forward(  # type: ignore[override]
        self,
        received: Inbox | Outputs | Tensor | None,
        inputs: Mapping[str, Tensor],
        labels: Tensor | None = None,
        weight: float = 1.0,
        loss_fn: LossFunction | None = None,
        terms: LossTerms = PLAIN,
        *,
        scores: bool = False,
    ) -> Tensor | Outputs:
        """Run the stage.

        Args:
            received: hidden states from the stage before, and what rides with them (``riding``); None on the first.
            inputs: what the model's forward takes, of this rank's batch rows of the embedding's layout; on later
                stages for shapes and masks alone.
            labels: on the last stage int64 [B/dp, S] of the head's layout, or [B/dp] where samples have classes.
            weight: what a label's loss counts for in the global loss.
            loss_fn: the loss of labels, in place of cross entropy.
            terms: what cross entropy is made of.
            scores: whether to count also what is told right, where samples have classes or are contrasted.

        Returns:
            The hidden chunk for the next stage with what rides along, or this rank's share of the loss (float32 scalar;
            of loss and what is told right [2]).
        """
        self._riding.clear()
        if isinstance(received, Inbox):
            received = received.open()
        if isinstance(received, tuple):
            received, *others = received
            self._riding.update(zip(self.riding(self.layers.start), others, strict=True))
        self._received = received
        if labels is not None:
            self._labels = labels, weight, terms, loss_fn
        if self.is_first:
            self.masks.draw_for(0, self._before)
        given = {name: v.to(self.compute_dtype) if v.is_floating_point() else v for name, v in inputs.items()}
        self._has_images = PIXELS in given
        if self.family.tower is not None and not self._sees_images:
            given.pop(PIXELS, None)  # grids say where tokens are
        try:
            outputs = self.model(**given, **self._options)
        except Reached as reached:
            value: Tensor | Outputs = reached.value
            return value
        finally:
            self.masks.draw_for(None)
            self._riding.clear()
            self._received = None
            for side in self._sides.values():
                side.forget()
        assert labels is not None
        if self.family.task == "contrast":
            bias = getattr(self.model, "logit_bias", None)
            pairs = pairs_of(outputs, self.model.logit_scale, bias, self.pairs)  # type: ignore[arg-type]
            shares = pairs.loss_share(weight), pairs.right_share(weight)
            return (torch.stack(shares) if scores else shares[0]) / self.head_tp.size
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


def _end_with_output(module: nn.Module, args: Any, output: Tensor) -> None:
    raise Reached(output)
