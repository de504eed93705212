"""One unit of a model alone, cut as one tensor-parallel rank holds it.

Takes a Hugging Face config; gives the embedding, one layer or the head as a module that runs as it does in
the runtime, by the runtime's own code, with collectives that move nothing.  Knows nothing of time or memory.

B sequences of S tokens, hidden size H; between units hidden states are [B, S/tp, H].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from galvatron.core.lora import Lora
from galvatron.core.model import ENDS, RECOMPUTES, LayerKind, ModelSpec, UnitName
from galvatron.core.tasks import TOKEN_TASKS
from galvatron.models import (
    Family,
    Link,
    blank_inputs,
    chain_of,
    experts_in,
    family_of,
    image_token,
    model_to_train,
    regions_in,
    words_of,
)
from galvatron.parallelize.layers.attention import Context, attend_across, use_attention
from galvatron.parallelize.layers.compile import LayerCompiler
from galvatron.parallelize.layers.fp8 import use_fp8
from galvatron.parallelize.layers.recompute import recompute_in_backward
from galvatron.parallelize.layers.tensor_parallel import cut_embedding, cut_layer, cut_positions, shrink
from galvatron.parallelize.losses.fused import fuse_loss
from galvatron.parallelize.pipeline.stage import PassedLayer, Stage
from galvatron.parallelize.processes.collectives import AxisGroup
from galvatron.plan.axes import prime_factors
from galvatron.plan.filling import Filling

from .local import BIAS, LocalUnit
from .whole import call_of_layer, embedding_unit, head_unit


@dataclass(frozen=True)
class UnitShape:
    """Which unit, at which cut, and whether layers are compiled, multiply in float8, have adapters: a measurement."""

    config: PretrainedConfig
    spec: ModelSpec
    name: UnitName
    tp: int
    seq_len: int
    dtype: torch.dtype
    compiled: bool = False
    fp8: bool = False
    lora: Lora | None = None

    def build(self, backend: str | None = None) -> LocalUnit:
        """The unit with parameters on meta; its collectives are stand-ins of ``tp`` ranks, of which it is the first.

        ``backend``: of the compiler, where layers are compiled; by default what training uses.
        """
        model, family = model_to_train(self.config, lora=self.lora), family_of(self.config)
        use_attention(model, family)
        self._freeze(model, family)
        # first in the world means tp rank 0, which holds the most of what does not divide
        tp = AxisGroup(None, prime_factors(self.tp)[::-1], 0)
        if self.name not in ENDS:
            layer_tp = replace(tp, filling=self._filling(self.spec.kind(self.name)))
            return self._layer(model, family, layer_tp, backend).train()
        if family.ends == "whole":
            whole = embedding_unit if self.name == "embedding" else head_unit
            groups = [replace(tp, filling=self._filling(kind)) for kind in self.spec.kind_of_layers()]
            return whole(model, family, self.spec, self.seq_len, groups).train()
        build = self._embedding if self.name == "embedding" else self._head
        return build(model, family, tp).train()

    @property
    def is_compiled(self) -> bool:
        """Whether this unit is: embedding and head never are."""
        return self.compiled and self.name not in ENDS

    @property
    def has_tower(self) -> bool:
        """Whether the embedding sees images of any number and size."""
        return family_of(self.config).tower is not None

    def first_kinds(self) -> list[UnitName]:
        """The kind of every stack's first layer."""
        chain = chain_of(model_to_train(self.config, lora=self.lora), family_of(self.config))
        kinds = self.spec.kind_of_layers()
        return [kinds[at].name for at, link in enumerate(chain) if at == 0 or link.stack != chain[at - 1].stack]

    def inputs(self, batch: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """(what the unit is called with, what else by name): ids [batch, S], images or hidden states; labels.

        Of several stacks also texts beside images, and the states that a decoder's layers see.  States ask for their
        gradient where the unit's layers, all but the first of them, give one to layers before.
        """
        if self.name == "embedding":
            blank = blank_inputs(self.config, self.spec.task, batch, self.seq_len, device)
            tokens, *others = ((name, self._drawn(name, given)) for name, given in blank.items())
            return tokens[1], dict(others)
        kind = self.spec.layers[-1] if self.name == "head" else self.spec.kind(self.name)
        hidden = self._states(kind, batch, device)
        hidden.requires_grad_(self.spec.is_reached(kind.name))
        if self.name != "head":
            return hidden, self._sides(kind, batch, device)
        of_tokens = self.spec.task in TOKEN_TASKS
        return hidden, {
            "labels": torch.randint(
                self.spec.vocab_size, (batch, self.seq_len) if of_tokens else (batch,), device=device
            )
        }

    def _drawn(self, name: str, blank: Tensor) -> Tensor:
        """Normal numbers, or ids of words with images where ``blank`` has them."""
        if blank.is_floating_point():
            return blank.normal_()
        if not name.endswith("input_ids"):  # what is said of tokens and images
            return blank
        words, image = torch.randint_like(blank, words_of(self.config)), image_token(self.config)
        if image is None:
            return words
        return torch.where(blank == image, image, torch.where(words == image, 0 if image else 1, words))

    def _filling(self, kind: LayerKind) -> Filling | None:
        tokens = self.spec.patches(kind, self.seq_len)
        return Filling.up(tokens, self.tp) if tokens else None

    def _states(self, kind: LayerKind, batch: int, device: torch.device) -> Tensor:
        filling = self._filling(kind)
        tokens = kind.tokens(self.seq_len) // self.tp if filling is None else filling.local(self.tp)
        shape = (batch, tokens, kind.hidden_size)
        return torch.empty(shape, dtype=self.dtype, device=device).normal_()

    def _sides(self, kind: LayerKind, batch: int, device: torch.device) -> dict[str, Tensor]:
        """What layers of ``kind`` see of the states that the first stack ends with, as many tokens as these have."""
        first = [k.name for k in self.spec.kind_of_layers()].index(kind.name)
        stack = next(nth for nth, layers in enumerate(self.spec.stack_ranges) if first in layers)
        side = family_of(self.config).stacks[stack].side
        if side is None:
            return {}
        states = self._states(self.spec.layers[0], batch, device)
        return {side: states.requires_grad_(self.spec.is_reached(kind.name))}

    def _freeze(self, model: PreTrainedModel, family: Family) -> None:
        """Let the unit's parameters require gradients as the specification says."""
        prefix = "" if self.name in ENDS else f"{self._link(model, family).path}."
        for parameter in self.spec.unit(self.name).parameters:
            model.get_parameter(prefix + parameter.name).requires_grad_(parameter.trainable)

    def _link(self, model: PreTrainedModel, family: Family) -> Link:
        """The first layer of the kind."""
        kinds = [kind.name for kind in self.spec.kind_of_layers()]
        return chain_of(model, family)[kinds.index(self.name)]

    def _embedding(self, model: PreTrainedModel, family: Family, tp: AxisGroup) -> LocalUnit:
        stage = Stage(model, family, range(0), is_first=True, is_last=False)
        owners = [model.get_submodule(name) for name in stage.first_paths]
        cut_embedding(owners[0], self.spec.embedding.parameters[0], tp)
        for positions in stage.position_tables():
            cut_positions(positions, (range(self.seq_len // tp.size),))
        return LocalUnit(stage, tuple(owners), (), position_ids=self._position_ids())

    def _head(self, model: PreTrainedModel, family: Family, tp: AxisGroup) -> LocalUnit:
        end = self.spec.num_layers
        stage = Stage(model, family, range(end, end), is_first=False, is_last=True)
        projection, head = self.spec.head.parameters[-1], stage.last_modules[-1]
        shrink(model, tuple(p for p in self.spec.head.parameters if p.cut is not None), tp)
        stage.head_tp = tp
        fuse_loss(head, projection, tp, stage.early_gradient)
        owners = stage.last_modules
        stage.receive_in(owners[0])
        return LocalUnit(stage, owners, (), position_ids=self._position_ids())

    def _layer(self, model: PreTrainedModel, family: Family, tp: AxisGroup, backend: str | None) -> LocalUnit:
        link = self._link(model, family)
        layer = model.get_submodule(link.path)
        regions, experts = regions_in(layer, link.stack), experts_in(layer, link.stack)
        if self.fp8:
            use_fp8(layer)
        cut_layer(layer, regions, self.spec.kind(self.name), tp, experts)
        args, kwargs = self._call_of_a_layer(model, family)
        kwargs.pop(str(link.stack.side), None)  # which is a batch's
        if link.stack.biased:
            attend_across(layer, Context(tp=tp))
            kwargs |= self._bias(layer)
        unit, plain = LocalUnit(layer, (layer,), args, **kwargs), layer.forward
        unit.experts = None if experts is None else layer.get_submodule(experts.module)
        compiler = LayerCompiler(backend) if self.compiled else None
        for level in RECOMPUTES:
            layer.forward = plain
            recompute_in_backward(
                layer,
                regions,
                tp,
                level,
                has_experts=experts is not None,
                needs_output=self.spec.kind(self.name).needs_output,
            )
            if compiler is not None:
                compiler(layer, level)
            unit.forwards[level] = layer.forward
        unit.recompute("none")
        return unit

    def _bias(self, layer: nn.Module) -> dict[str, Tensor]:
        """The bias of scores that layers are given which do not make it (``layers.bias``)."""
        kind = self.spec.kind(self.name)
        if any(hasattr(module, "relative_attention_bias") for module in layer.modules()):
            return {}
        tokens = kind.tokens(self.seq_len)
        return {BIAS: torch.zeros(1, 1, kind.num_heads, tokens, tokens, dtype=self.dtype)}

    def _call_of_a_layer(self, model: PreTrainedModel, family: Family) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model gives its layers beside the hidden states; a dry run finds out, without parameters."""
        if family.ends == "whole":
            another = model_to_train(self.config, lora=self.lora)
            use_attention(another, family)
            kinds = [kind.name for kind in self.spec.kind_of_layers()]
            return call_of_layer(another, family, kinds.index(self.name), self.seq_len)
        stage, recorder = Stage(model, family, range(1, 1), is_first=False, is_last=False), _Recorder()
        model.set_submodule(stage.chain[0].path, recorder)
        hidden = torch.zeros(1, self.seq_len // self.tp, self.spec.hidden_size, dtype=self.dtype)
        with torch.no_grad():
            stage.decoder(inputs_embeds=hidden, position_ids=self._position_ids(), use_cache=False)
        return recorder.args, recorder.kwargs

    def _position_ids(self) -> Tensor:
        return torch.arange(self.seq_len).unsqueeze(0)


class _Recorder(PassedLayer):
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 (replaced, never changed)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.args, self.kwargs = args, kwargs
        return hidden_states
