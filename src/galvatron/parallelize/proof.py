"""Does the runtime compute what an unknown type of model computes?  Gradients of a tiny twin decide.

Takes a config; runs its twin whole, in two stages one after the other, and cut between two threads, by the modules that
training uses, and compares losses and every gradient.  All parameters are random: at initial values a wrong cut moves
outputs by a thousandth, and trains on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PretrainedConfig

from galvatron.core.errors import ConfigError
from galvatron.core.family import known_family
from galvatron.core.model import LayerKind, ModelSpec, ParameterSpec
from galvatron.core.tasks import TOKEN_TASKS
from galvatron.models import (
    Family,
    experts_in,
    family_of,
    regions_in,
    spec_of,
    structure_key,
    task_of,
    twin_config,
    twin_model,
)
from galvatron.models.recognise import recognise
from galvatron.models.sizes import CLASSES, WORDS
from galvatron.models.twin import run_twin, twin_inputs
from galvatron.plan.filling import Filling

from .layers.attention import Context, attend_across, use_attention
from .layers.sides import OwnSide
from .layers.tensor_parallel import cut_embedding, cut_layer, cut_positions, shrink
from .losses.fused import fuse_loss
from .pipeline.stage import Stage
from .pipeline.whole import WholeStage, stage_of
from .processes.collectives import AxisGroup
from .processes.lockstep import Lockstep
from .state.pieces import box, pieces_of

TOLERANCE = 1e-4
"""Of a unit's largest gradient; what is right differs by 1e-6 of it, the smallest wrong found by 1e-2."""
KV_HEADS = (2, 1)
ROWS, SEQ_LEN, TP = 2, 16, 2
_proofs: dict[str, Proof] = {}


@dataclass(frozen=True)
class Proof:
    """What was found wrong, a sentence each; None is right.

    Attributes:
        whole: of the model driven in stages: without it nothing runs.
        tp: of layers that are cut.
    """

    whole: str | None = None
    tp: str | None = None


def prove(config: PretrainedConfig) -> Proof:
    """Run the twins of ``config``, once a structure and process; takes a second or two."""
    key = structure_key(config)
    if key not in _proofs:
        family = family_of(config)
        try:
            _proofs[key] = _proof(config, family)
        except Exception as failure:  # of any kind: foreign models are built and described
            _proofs[key] = Proof(whole=f"it fails with {_said(failure)}")
    return _proofs[key]


def proved_structures(config: PretrainedConfig) -> dict[str, str]:
    """The structures of a type's ``config``, as it is and one flag changed at a time, that are right; in words."""
    found: dict[str, str] = {}
    own = recognise(config)
    for name, usual in {"": None, **config.to_dict()}.items():
        changed = copy.deepcopy(config)
        if name:
            if not isinstance(usual, bool):
                continue
            setattr(changed, name, not usual)
        key = structure_key(changed)
        try:
            # data hold one family for all that is proved by its cuts
            right = key in found or (recognise(changed) == own and prove(changed) == Proof())
        except ConfigError:
            right = False
        if right:
            found.setdefault(key, f"{name}={str(not usual).lower()}" if name else "as the type's own config")
    return found


def is_known(config: PretrainedConfig) -> bool:
    """Whether this structure was proved with this version of transformers, as the data that ship say."""
    known = known_family(config.model_type, task_of(config))
    return (
        known is not None and known.transformers == transformers.__version__ and structure_key(config) in known.proved
    )


def _proof(config: PretrainedConfig, family: Family) -> Proof:
    whole, tp, compared = None, None if family.is_cuttable else "no rule fits its linears", False
    twins = {_text(twin): twin for kv_heads in KV_HEADS for twin in [twin_config(config, kv_heads)]}
    for twin in twins.values():
        truth = _Truth.of(twin)
        run = _in_stages if len(family.stacks) == 1 else _alone
        whole = whole or truth.problem() or truth.against(run, twin, family)
        if tp is None and whole is None and _is_allowed(spec_of(twin_model(twin), family=family)):
            tp, compared = truth.against(_between_threads, twin, family), True
    if tp is None and not compared:
        tp = "its cuts divide by no number"
    return Proof(whole, tp)


def _text(config: PretrainedConfig) -> str:
    text: str = config.to_json_string(use_diff=False)
    return text


def _is_allowed(spec: ModelSpec) -> bool:
    """Whether the rules let a plan cut layers between TP ranks."""
    cuts = [parameter.cut for kind in spec.layers for parameter in kind.parameters if parameter.cut is not None]
    return not any(cut.uneven == "refuse" and cut.blocks % TP for cut in cuts)


Gradients = dict[str, Tensor]


def _batch(twin: PretrainedConfig) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of the twin's task, and labels."""
    of_tokens, generator = task_of(twin) in TOKEN_TASKS, torch.Generator().manual_seed(1)
    shape, most = ((ROWS, SEQ_LEN), WORDS) if of_tokens else ((ROWS,), CLASSES)
    return twin_inputs(twin, ROWS), torch.randint(most, shape, generator=generator)


@dataclass(frozen=True)
class _Truth:
    """What the unmodified twin computes: its loss, and its gradients by name."""

    loss: float
    gradients: Mapping[str, Tensor]

    @staticmethod
    def of(twin: PretrainedConfig) -> _Truth:
        model, (inputs, labels) = twin_model(twin), _batch(twin)
        if task_of(twin) == "contrast":
            loss = ROWS * model(**inputs, return_loss=True).loss
        else:
            logits = run_twin(model, inputs)
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return _Truth(loss.item(), found)

    def problem(self) -> str | None:
        """Why nothing can be compared with it, as a sentence."""
        if not (math.isfinite(self.loss) and all(bool(g.isfinite().all()) for g in self.gradients.values())):
            return "its loss or gradients are not finite"
        return None if any(bool(g.any()) for g in self.gradients.values()) else "it has no gradients"

    def against(self, run: object, twin: PretrainedConfig, family: Family) -> str | None:
        """What differs in another way to run the twin, as a sentence."""
        try:
            loss, gradients = run(twin, family)  # type: ignore[operator]
        except Exception as failure:  # of any kind: a foreign model runs there
            return f"it fails with {_said(failure)}"
        if abs(loss - self.loss) > TOLERANCE * abs(self.loss):
            return f"the loss is {loss:.6g}, not {self.loss:.6g}"
        largest: dict[str, float] = {}
        for name, wanted in self.gradients.items():
            largest[_unit(name)] = max(float(wanted.abs().max()), largest.get(_unit(name), 0.0))
        for name, wanted in self.gradients.items():
            scale = largest[_unit(name)]
            error = float((gradients[name] - wanted).abs().max()) if name in gradients else float("inf")
            if not error <= TOLERANCE * scale:
                return f"the gradient of {name} is off by {error / max(scale, 1e-30):.2g} of its unit's largest"
        if more := sorted(name for name in gradients.keys() - self.gradients.keys() if bool(gradients[name].any())):
            return f"{more[0]} has a gradient, which it has not in the whole twin"
        return None


def _said(failure: Exception) -> str:
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__} ({lines[0][:200] if lines else 'no message'})"


def _unit(name: str) -> str:
    """A layer by its index, the rest by itself: of one layer gradients are of one size."""
    numbers = [i for i, part in enumerate(name.split(".")) if part.isdigit()]
    return ".".join(name.split(".")[: numbers[0] + 1]) if numbers else name


def _prepared(twin: PretrainedConfig, family: Family, layers: range, *, ends: tuple[bool, bool]) -> Stage:
    model = twin_model(twin)
    use_attention(model, family)
    return stage_of(model, family, layers, is_first=ends[0], is_last=ends[1]).train()


def _in_stages(twin: PretrainedConfig, family: Family) -> tuple[float, Gradients]:
    """As many stages as layers, one after the other in one graph: every cut between layers."""
    inputs, labels = _batch(twin)
    spec, alone = spec_of(twin_model(twin), family=family), AxisGroup(None, (), 0)
    ends = spec.num_layers - 1
    stages = [_prepared(twin, family, range(i, i + 1), ends=(i == 0, i == ends)) for i in range(spec.num_layers)]
    for index, stage in enumerate(stages[1:], 1):
        stage.receive_in(stage.layer(index))
    last = stages[-1]
    if family.head is not None:
        fuse_loss(last.last_modules[-1], spec.head.parameters[-1], alone, last.early_gradient)
    if isinstance(last, WholeStage):
        last.end_at_head()
    hidden = None
    for stage in stages[:-1]:
        hidden = _run(stage, inputs, received=hidden)
    share = _run(last, inputs, labels, hidden)
    share.backward()
    found: Gradients = {}
    for stage in stages:
        for name, parameter in stage.model.named_parameters():
            _add(found, name, parameter.grad)
    for stage, parameters in ((stages[0], spec.embedding.parameters), (last, spec.head.parameters)):
        for own in parameters:  # by the name that the model knows it by
            if (path := stage.placed(own).name) != own.name:
                _add(found, own.name, found.pop(path, None))
    if spec.tied_names:
        table, projection = spec.tied_names
        _add(found, table, found.pop(projection, None))
    return share.item(), found


def _alone(twin: PretrainedConfig, family: Family) -> tuple[float, Gradients]:
    """All of it on one rank, by the modules that training uses."""
    spec = spec_of(twin_model(twin), family=family)
    stage = _cut_stage(twin, family, spec, AxisGroup(None, (), 0), dict(twin_model(twin).named_parameters()))
    inputs, labels = _batch(twin)
    share = _run(stage, inputs, labels)
    share.backward()
    found = {name: stage.model.get_parameter(path).grad for name, path, _ in _named(spec, stage)}
    return share.item(), {name: gradient for name, gradient in found.items() if gradient is not None}


def _run(
    stage: Stage, inputs: dict[str, Tensor], labels: Tensor | None = None, received: Tensor | None = None
) -> Tensor:
    if isinstance(stage, WholeStage):
        output: Tensor = stage(received, inputs, labels)
    else:
        tokens = inputs["input_ids"] if received is None else received
        output = stage(tokens, torch.arange(SEQ_LEN).unsqueeze(0), labels)
    return output


def _add(found: Gradients, name: str, gradient: Tensor | None) -> None:
    if gradient is not None:
        found[name] = found[name] + gradient if name in found else gradient


def _between_threads(twin: PretrainedConfig, family: Family) -> tuple[float, Gradients]:
    """All layers, cut between threads that meet at every collective."""
    spec = spec_of(twin_model(twin), family=family)
    values = dict(twin_model(twin).named_parameters())
    ranks, found, loss = Lockstep(TP), Gradients(), 0.0
    stages = [_cut_stage(twin, family, spec, AxisGroup(ranks, (TP,), rank), values) for rank in range(TP)]
    inputs, labels = _batch(twin)

    def run(rank: int) -> float:
        share = _run(stages[rank], inputs, labels)
        share.backward()
        return share.item()

    loss = sum(ranks.run(run))
    for rank, stage in enumerate(stages):
        for name, path, parameter in _named(spec, stage):
            gradient = stage.model.get_parameter(path).grad
            if gradient is not None:
                _add(found, name, _spread(parameter, gradient, rank))
    return loss, found


def _named(spec: ModelSpec, stage: Stage) -> list[tuple[str, str, ParameterSpec]]:
    """Every parameter of the model by its name and its path in a stage, a tied one once."""
    head = spec.head.parameters[:-1] if spec.tied_embeddings else spec.head.parameters
    named = [(p.name, stage.placed(p).name, p) for p in (*spec.embedding.parameters, *head)]
    for index, kind in enumerate(spec.kind_of_layers()):
        prefix = f"{stage.chain[index].path}."
        named += [(prefix + p.name, prefix + p.name, p) for p in kind.parameters]
    return named


def _cut_stage(
    twin: PretrainedConfig, family: Family, spec: ModelSpec, tp: AxisGroup, values: Mapping[str, Tensor]
) -> Stage:
    """One rank's part of a whole twin, with its part of ``values``."""
    stage = _prepared(twin, family, range(spec.num_layers), ends=(True, True))
    model = stage.model
    is_whole = isinstance(stage, WholeStage)
    tables = stage.tables
    for table in tables:
        cut_embedding(table, spec.embedding.parameters[0], tp, whole=is_whole)
        table.weight = tables[0].weight
    for positions in stage.position_tables():
        length = SEQ_LEN // tp.size
        cut_positions(positions, (range(tp.rank * length, (tp.rank + 1) * length),))
    groups = [replace(tp, filling=_filling(spec, kind, tp.size)) for kind in spec.kind_of_layers()]
    for index, kind in enumerate(spec.kind_of_layers()):
        layer = stage.layer(index)
        stack = stage.chain[index].stack
        cut_layer(layer, regions_in(layer, stack), kind, groups[index], experts_in(layer, stack))
        attend_across(layer, Context(tp=groups[index]))
    stage.head_tp = tp
    if family.head is not None:
        head = stage.last_modules[-1]
        shrink(model, tuple(stage.placed(p) for p in spec.head.parameters if p.cut is not None), tp)
        if spec.tied_embeddings:
            head.weight = model.get_submodule(str(family.embedding)).weight
        fuse_loss(head, spec.head.parameters[-1], tp, stage.early_gradient)
    if isinstance(stage, WholeStage):
        _meet_whole(stage, groups)
    with torch.no_grad():
        for name, path, parameter in _named(spec, stage):
            local = model.get_parameter(path)
            for piece in pieces_of(parameter, tp.size, tp.rank, 1, 0):
                whole = box(values[name], piece.global_offset, piece.size)
                box(local, piece.local_offset, piece.size).copy_(whole)
    return stage


def _filling(spec: ModelSpec, kind: LayerKind, degree: int) -> Filling | None:
    patches = spec.patches(kind, SEQ_LEN if spec.task != "image_classification" else spec.max_seq_len)
    return Filling.up(patches, degree) if patches else None


def _meet_whole(stage: WholeStage, groups: Sequence[AxisGroup]) -> None:
    for index, link in enumerate(stage.chain):
        tp = groups[index]
        if link.is_first:
            stage.enter_from_whole(index, tp)
        if link.stack.side is not None:
            OwnSide(replace(tp, filling=None), lambda hidden: hidden).enter(stage.layer(index), link.stack.side)
        if link.is_last:
            stage.leave_whole(index, lambda hidden: hidden, tp)
    stage.end_at_head()


def _spread(parameter: ParameterSpec, gradient: Tensor, rank: int) -> Tensor:
    """A rank's gradient in its place of the whole parameter's."""
    whole = gradient.new_zeros(parameter.shape)
    for piece in pieces_of(parameter, TP, rank, 1, 0):
        box(whole, piece.global_offset, piece.size).copy_(box(gradient, piece.local_offset, piece.size))
    return whole


def refuse_unproved(config: PretrainedConfig, *, uses_tp: bool) -> None:
    """Raise ConfigError if a twin of ``config`` is not computed right, or not under tensor parallelism if used."""
    if is_known(config):
        return
    proof = prove(config)
    if proof.whole is not None:
        raise ConfigError(
            f"model_type={config.model_type!r} is not computed right by galvatron, as a tiny twin of it shows: "
            f"{proof.whole}; train another model"
        )
    if uses_tp and proof.tp is not None:
        raise ConfigError(
            f"layers of model_type={config.model_type!r} are not cut right by tensor parallelism, as a tiny twin of it "
            f"shows: {proof.tp}; use plans of tp 1"
        )
