"""Does the runtime compute what an unknown type of model computes?  Gradients of a tiny twin decide.

Takes a config; runs its twin whole, in stages one after the other, and cut between two threads, by the modules that
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
from galvatron.plan import LayerStrategy, copied_to
from galvatron.plan.filling import Filling

from .layers.attention import Context, attend_across, use_attention
from .layers.sides import OwnSide
from .layers.tensor_parallel import cut_embedding, cut_layer, cut_positions, shrink
from .losses.fused import fuse_loss
from .pipeline.passes import Outputs
from .pipeline.stage import Stage
from .pipeline.whole import WholeStage, stage_of
from .processes.collectives import ALONE, AxisGroup
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
        whole: of the model driven by galvatron: without it nothing runs.
        tp: of layers that are cut.
        pp: of the model driven in stages, as many as it has layers.
    """

    whole: str | None = None
    tp: str | None = None
    pp: str | None = None


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
    whole, tp, pp, compared = None, None if family.is_cuttable else "no rule fits its linears", None, False
    twins = {_text(twin): twin for kv_heads in KV_HEADS for twin in [twin_config(config, kv_heads)]}
    for twin in twins.values():
        truth = _Truth.of(twin)
        if whole is None and pp is None:
            whole = truth.problem()
            pp = truth.against(_in_stages, twin, family) if whole is None else None
        if pp is not None:
            whole = whole or (pp if len(family.stacks) == 1 else truth.against(_alone, twin, family))
        if tp is None and whole is None and _is_allowed(spec_of(twin_model(twin), family=family)):
            tp, compared = truth.against(_between_threads, twin, family), True
    if tp is None and not compared:
        tp = "its cuts divide by no number"
    return Proof(whole, tp, pp)


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
    spec = spec_of(twin_model(twin), family=family)
    ends = spec.num_layers - 1
    stages = [_prepared(twin, family, range(i, i + 1), ends=(i == 0, i == ends)) for i in range(spec.num_layers)]
    for stage in stages:
        if isinstance(stage, WholeStage):
            _see_sides(stage)
            stage.meet_neighbours(lambda _: ALONE)
        elif not stage.is_first:
            stage.receive_in(stage.layer(stage.layers.start))
    last = stages[-1]
    if family.head is not None:
        fuse_loss(last.last_modules[-1], spec.head.parameters[-1], ALONE, last.early_gradient)
    if isinstance(last, WholeStage):
        last.end_at_head()
    outputs = None
    for stage in stages[:-1]:
        outputs = _run(stage, inputs, received=outputs)
    share = _run(last, inputs, labels, outputs)
    assert isinstance(share, Tensor)
    share.backward()
    found: Gradients = {}
    for stage in stages:
        for name, path, _ in _named(spec, stage):
            _add(found, name, stage.model.get_parameter(path).grad)
    return share.item(), found


def _see_sides(stage: WholeStage) -> None:
    """Let the layers of one rank see what other layers make for them."""
    for index in stage.layers:
        layer, side = stage.layer(index), stage.chain[index].stack.side
        attend_across(layer, Context())
        if side is not None:
            stage.side_of(LayerStrategy(), ALONE, lambda hidden: hidden).enter(layer, side)


def _alone(twin: PretrainedConfig, family: Family) -> tuple[float, Gradients]:
    """All of it on one rank, by the modules that training uses."""
    spec = spec_of(twin_model(twin), family=family)
    stage = _cut_stage(twin, family, spec, ALONE, dict(twin_model(twin).named_parameters()))
    inputs, labels = _batch(twin)
    share = _run(stage, inputs, labels)
    assert isinstance(share, Tensor)
    share.backward()
    found = {name: stage.model.get_parameter(path).grad for name, path, _ in _named(spec, stage)}
    return share.item(), {name: gradient for name, gradient in found.items() if gradient is not None}


def _run(
    stage: Stage, inputs: dict[str, Tensor], labels: Tensor | None = None, received: Tensor | Outputs | None = None
) -> Tensor | Outputs:
    if isinstance(stage, WholeStage):
        output: Tensor | Outputs = stage(received, inputs, labels)
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
        assert isinstance(share, Tensor)
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
    """Every parameter that a stage has by its name and its path there, a tied one once."""
    embedding, table = spec.embedding_within(stage.layers), spec.embedding.parameters[:1]
    named = [(p.name, stage.placed(p).name, p) for p in embedding]
    kinds = spec.kind_of_layers()
    own = [(index, p) for index in stage.layers for p in kinds[index].parameters]
    for index, p in (*own, *((index, p) for index, _, p in copied_to(spec, stage.layers))):
        path = f"{stage.chain[index].path}.{p.name}"
        named.append((path, path, p))
    if not stage.is_last:
        return named
    head, projection = spec.head.parameters, spec.head.parameters[-1]
    if spec.tied_embeddings:
        head = head[:-1]
        named += [] if table[0] in embedding else [(table[0].name, projection.name, projection)]
    return [*named, *((p.name, stage.placed(p).name, p) for p in head)]


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
            head.weight = tables[0].weight
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


def refuse_unproved(config: PretrainedConfig, *, uses_tp: bool, uses_pp: bool) -> None:
    """Raise ConfigError if a twin of ``config`` is not computed right, or not in stages or cut if it shall be."""
    if is_known(config):
        return
    proof = prove(config)
    if proof.whole is not None:
        raise ConfigError(
            f"model_type={config.model_type!r} is not computed right by galvatron, as a tiny twin of it shows: "
            f"{proof.whole}; train another model"
        )
    if uses_pp and proof.pp is not None:
        raise ConfigError(
            f"stages of model_type={config.model_type!r} do not compute what all of it does, as a tiny twin of it "
            f"shows: {proof.pp}; use plans of pp 1"
        )
    if uses_tp and proof.tp is not None:
        raise ConfigError(
            f"layers of model_type={config.model_type!r} are not cut right by tensor parallelism, as a tiny twin of it "
            f"shows: {proof.tp}; use plans of tp 1"
        )
