"""One model chunk of a pipeline stage of a Hugging Face model, driven by the model's own forward.

The decoder runs as it is, fed with ``inputs_embeds``; layers of other stages are stand-ins that pass hidden
states on, and the first own layer begins with what was received, so whatever the family's forward does before
its layers is undone there.  Hidden states are [B/dp, S/sp, H] chunks throughout.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from galvatron.core.model import ParameterSpec
from galvatron.models import Family, chain_of

from ..layers.documents import Packed
from ..layers.forward import wrap_forward
from ..layers.later import Later
from ..losses.early import EarlyGradient
from ..losses.fused import PLAIN, LossTerms, logit_terms
from ..losses.own import LossFunction, own_loss_share
from ..processes.collectives import ALONE, AxisGroup, gather_sequence
from .passes import Inbox


class PassedLayer(nn.Module):
    """Stands where another stage's module is: returns its first argument."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return ``hidden_states`` unchanged."""
        return hidden_states


class NoPositions(nn.Module):
    """Stands where the first stage has learnt positions: a zero that broadcasts."""

    def forward(self, ids_BS: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return a scalar zero."""
        return torch.zeros((), device=ids_BS.device)


class Stage(nn.Module):
    """A part of ``model`` that one stage owns, from token ids or hidden states to hidden states or loss.

    Of a family whose ends see tokens; ``pipeline.whole`` has the others.
    """

    def __init__(self, model: PreTrainedModel, family: Family, layers: range, *, is_first: bool, is_last: bool) -> None:
        """Replace what other stages own by stand-ins, in place."""
        super().__init__()
        self.model, self.family = model, family
        self.layers, self.is_first, self.is_last = layers, is_first, is_last
        self.head_tp: AxisGroup = ALONE
        self.early_gradient = EarlyGradient()  # of the head's weight
        self.logit_terms = logit_terms(family.logits, model.config)
        self.later: Later | None = None  # weight passes
        self.position_spans: tuple[range, ...] = ()  # of the positions that ``forward`` is told of
        self.position_rows = range(1)  # and of the sequences of a microbatch, where documents are packed
        self.document_rows: set[range] = set()  # that its layers see
        self.packed = Packed()
        self.chain = chain_of(model, family)
        self._output: Tensor | None = None
        self._received: Tensor | Inbox | None = None
        self._leave_others()

    def _leave_others(self) -> None:
        """Put stand-ins in the place of what other stages own."""
        model, family = self.model, self.family
        for index, link in enumerate(self.chain):
            if index not in self.layers:
                model.set_submodule(link.path, PassedLayer())
        if not self.is_first:
            for module, name in zip(self.first_modules, self.first_paths, strict=True):
                is_position = name != family.embedding and isinstance(module, nn.Embedding)
                model.set_submodule(name, NoPositions() if is_position else PassedLayer())
        if not self.is_last:
            for name in self.last_paths:
                model.set_submodule(name, PassedLayer())
        model.get_submodule(str(family.norm)).register_forward_hook(self._keep_output)

    @property
    def first_paths(self) -> tuple[str, ...]:
        """Where the modules before the layers are that have the parameters."""
        return (str(self.family.embedding), *self.family.before)

    @property
    def last_paths(self) -> tuple[str, ...]:
        """The same after the layers, the head last."""
        return (str(self.family.norm), str(self.family.head))

    @property
    def first_modules(self) -> tuple[nn.Module, ...]:
        """The modules at ``first_paths``."""
        return tuple(map(self.model.get_submodule, self.first_paths))

    @property
    def last_modules(self) -> tuple[nn.Module, ...]:
        """The modules at ``last_paths``."""
        return tuple(map(self.model.get_submodule, self.last_paths))

    @property
    def entry_modules(self) -> tuple[nn.Module, ...]:
        """Those of the embedding's modules that this stage has."""
        return self.first_modules if self.is_first else ()

    def is_joint(self, index: int) -> bool:
        """Whether layer ``index`` is the last of a stack that another follows."""
        return index + 1 < len(self.chain) and self.chain[index].stack is not self.chain[index + 1].stack

    @property
    def elsewhere(self) -> list[nn.Parameter]:
        """What is left of the parameters of other stages: no elements."""
        return [parameter for parameter in self.parameters() if not parameter.numel()]

    @property
    def tables(self) -> list[nn.Embedding]:
        """The embeddings of the vocabulary that this stage has, which share a weight."""
        embedding = self.model.get_submodule(str(self.family.embedding))
        assert isinstance(embedding, nn.Embedding)
        return [embedding]

    def placed(self, parameter: ParameterSpec) -> ParameterSpec:
        """``parameter`` of an end by the path where this stage has it, which a tied one has several of."""
        return parameter

    def layer(self, index: int) -> nn.Module:
        """Layer ``index`` of the whole chain."""
        return self.model.get_submodule(self.chain[index].path)

    @property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        return self.model.get_submodule(self.family.decoder)

    def position_tables(self) -> list[nn.Embedding]:
        """The embeddings of positions that this stage has."""
        found = map(self.model.get_submodule, self.family.before)
        return [module for module in found if isinstance(module, nn.Embedding)]

    def receive_in(self, module: nn.Module) -> None:
        """Let the first own module begin with what the previous stage sent.

        Within the module, so that the gradient is sent before FSDP2 reduces those of the module's parameters.
        """
        wrap_forward(module, lambda forward, hidden, *args, **kwargs: forward(self._open(), *args, **kwargs))

    def _open(self) -> Tensor:
        received, self._received = self._received, None
        assert received is not None
        return received.open()[0] if isinstance(received, Inbox) else received

    def forward(
        self,
        tokens: Tensor | Inbox,
        position_ids: Tensor,
        labels: Tensor | None = None,
        weight: float = 1.0,
        loss_fn: LossFunction | None = None,
        terms: LossTerms = PLAIN,
    ) -> Tensor:
        """Run the stage.

        Args:
            tokens: on the first stage ids [B/dp, S/ulysses] of the embedding's layout, else hidden states or what was
                received.
            position_ids: [1, S], or as many as ``position_spans`` count; of each of ``position_rows`` where ``packed``.
            labels: on the last stage ids [B/dp, S/ulysses] of the head's layout.
            weight: what a token's loss counts for in the global loss.
            loss_fn: the loss of tokens, in place of cross entropy.
            terms: what cross entropy is made of.

        Returns:
            The hidden chunk for the next stage, or this rank's share of the loss (float32 scalar).
        """
        if self.is_first:
            hidden = self.first_modules[0](tokens)
        else:
            # what the family's forward sees before the first own module has the same shape and no memory
            self._received, hidden = tokens, tokens.new_zeros(()).expand(tokens.shape)
        self.decoder(inputs_embeds=hidden, position_ids=position_ids, use_cache=False)
        hidden, self._output = self._output, None
        assert hidden is not None
        if not self.is_last:
            return hidden
        assert labels is not None
        head, whole = self.last_modules[-1], gather_sequence(hidden, self.head_tp)
        if loss_fn is not None:
            logits, vocabulary_size = self.logit_terms.logits(head(whole)).flatten(0, 1), self.model.config.vocab_size
            return own_loss_share(loss_fn, logits, labels.flatten(), vocabulary_size, weight, self.head_tp)
        share: Tensor = head(whole, labels, weight, self._terms(terms))
        return share

    def _terms(self, terms: LossTerms) -> LossTerms:
        """Those of a batch, of logits as the model makes them."""
        return replace(terms, logit_scale=self.logit_terms.logit_scale, soft_cap=self.logit_terms.soft_cap)

    def _keep_output(self, module: nn.Module, args: Any, output: Tensor) -> None:
        # not what the decoder returns: GPT-2 views that in the shape that came in, wrong if layouts differ
        self._output = output
