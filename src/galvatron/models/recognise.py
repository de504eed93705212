"""Recognition: which modules of an unknown type are embedding, layers, norm and head, and how a layer can be cut.

Takes a config; runs its tiny twin once and watches.  The stack is the list of modules that hand their output on one to
the next; what is cut is found from which linear feeds which, and how from which outputs of the one reach which inputs
of the other.  A guess: the gradients of ``galvatron.parallelize.proof`` decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from galvatron.core.errors import GalvatronError, UnfitError
from galvatron.core.family import Experts, Family, Logits, Region, Stack
from galvatron.core.tasks import TOKEN_TASKS

from .attention import asks_for_attention
from .ends import around, joints_of, makers_of
from .failures import where
from .heads import heads_in
from .layouts import experts_of, regions_of
from .stacks import is_changed, stacks_of
from .tasks import task_of
from .towers import OwnWay, tower_of
from .trace import Trace, traced
from .twin import is_factor, twin_config, twin_inputs, twin_model

REMEDY = "galvatron trains chains of layers between an embedding and a head"
MAX_REASON = 200
FEATURE_LAYER = "vision_feature_layer"
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn")


@torch.enable_grad()
def recognise(config: PretrainedConfig) -> Family:
    """The family of ``config``'s type and flags.

    Raises:
        UnfitError: it is no chain of equal layers between one embedding and one head, in words.
    """
    model, trace = _watched(config)
    for name in trace.ignored:
        raise _unlike(config, f"does not look at {name} without further inputs beside them")
    try:
        return _family(config, model, trace)
    except OwnWay as way:
        raise _unlike(config, str(way)) from None
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # what chains of layers have
        raise _unlike(config, "is built in a way that is not known", where(error)) from None


def _watched(config: PretrainedConfig) -> tuple[PreTrainedModel, Trace]:
    """A twin, and its forward pass."""
    lacks = "cannot be built small"
    try:
        twin = twin_config(config)
        for name in ACTIVATIONS:
            if isinstance(getattr(twin, name, None), str):
                setattr(twin, name, "gelu")  # every unit lets something through
        model = twin_model(twin)
        inputs = twin_inputs(twin)
        lacks = f"does not run on {' and '.join(inputs)} as other models take them"
        return model, traced(model, inputs)
    except ImportError as error:
        raise _unlike(config, "needs a package that is not installed", _reason(error)) from None
    except GalvatronError:
        raise
    except Exception as error:  # of any kind: a foreign model is built and run
        raise _unlike(config, lacks, _reason(error)) from None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:MAX_REASON] if lines else type(error).__name__


def _family(config: PretrainedConfig, model: PreTrainedModel, trace: Trace) -> Family:
    stacks, packed = stacks_of(model, trace)
    tower = tower_of(model, packed, stacks)
    found = tuple(
        _described(model, trace, stack, stacks[:nth], is_tower=stack is not stacks[-1])
        for nth, stack in enumerate(stacks)
    )
    asks, masks = asks_for_attention(config, found)
    if asks:  # galvatron's attention takes its heads of biases itself
        plain = [tuple(_with_head_inputs(region, {}) for region in stack.regions) for stack in found]
        found = tuple(s.model_copy(update={"regions": regions}) for s, regions in zip(found, plain, strict=True))
    ends = None
    if asks and len(stacks) == 1 and task_of(config) == "causal_lm":
        ends = _ends_of_tokens(model, trace, stacks[0])
    ends = ends or _whole_ends(model, trace, stacks, tower)
    joints = joints_of(model, stacks, trace.calls, ends["before"])
    found = tuple(stack.model_copy(update=joint) for stack, joint in zip(found, joints, strict=True))
    return Family(model_type=config.model_type, stacks=found, asks_for_attention=asks, needless_masks=masks, **ends)


def _with_head_inputs(region: Region, inputs: dict[str, int]) -> Region:
    return region.model_copy(update={"head_inputs": inputs})


def _merged(regions: list[Region]) -> list[Region]:
    """Every region once; some layers are given a bias that others make."""
    found: dict[str, Region] = {}
    for region in regions:
        key = _with_head_inputs(region, {}).model_dump_json()
        inputs = {**region.head_inputs, **(found[key].head_inputs if key in found else {})}
        found[key] = _with_head_inputs(region, inputs)
    return list(found.values())


def _described(
    model: PreTrainedModel, trace: Trace, stack: nn.ModuleList, before: list[nn.ModuleList], *, is_tower: bool
) -> Stack:
    """A stack, with the regions of every kind of layer that it has.

    ``before``: those that end before it begins; ``is_tower``: whether one follows it.
    """
    path = next(name for name, module in model.named_modules() if module is stack)
    side = _side(trace, stack, before)
    regions: list[Region] = []
    experts: list[Experts | None] = []
    is_cuttable, needs_output = True, False
    for index in _one_of_each_kind(stack):
        prefix = f"{path}.{index}."
        inside = [call for call in trace.calls if call.name.startswith(prefix)]
        found = regions_of(trace.of(stack[index]), inside, prefix, heads_in(stack[index], model.config)["heads"], side)
        regions = _merged([*regions, *found])
        experts.append(experts_of(stack[index], inside, prefix, trace.of(stack[index]).argument.shape[-1]))
        is_cuttable &= bool(found)
        ends = [f"{prefix}{name}" for name in (*(r.row for r in found), *(e.module for e in experts[-1:] if e))]
        needs_output |= trace.of(stack[index]).saved > max((c.saved for c in inside if c.name in ends), default=0)
    kinds = [kind for nth, kind in enumerate(experts) if kind is not None and kind not in experts[:nth]]
    is_taken_at = is_tower and _is_taken_at(model, trace, stack)
    is_cuttable &= len({region.row for region in regions}) == len(regions) and len(kinds) <= 1
    return Stack(
        path=path,
        regions=tuple(regions) if is_cuttable else (),
        experts=kinds[0] if len(kinds) == 1 else None,
        outputs=trace.of(stack[0]).outputs,
        causal=_is_causal(trace, stack),
        side=side,
        biased=any(hasattr(module, "compute_bias") for module in stack.modules()),
        needs_output=is_cuttable and needs_output,
        recorded=is_changed(trace, stack) or (not is_taken_at and _is_recorded(trace, stack)),
        taken_at=FEATURE_LAYER if is_taken_at else None,
    )


def _side(trace: Trace, stack: nn.ModuleList, before: list[nn.ModuleList]) -> str | None:
    """The argument of all layers that carries what an earlier stack ends with."""
    first, second = trace.of(stack[0]), trace.of(stack[1])
    parameters = {id(p) for other in before for p in other.parameters()}
    for name, tensor in first.named.items():
        if tensor is not first.argument and second.named.get(name) is tensor and _depends_on(tensor, parameters):
            return name
    return None


def _is_taken_at(model: PreTrainedModel, trace: Trace, stack: nn.ModuleList) -> bool:
    """Whether the config says after which layer of a tower its states are taken: none behind it counts, and it does."""
    taken_at, layers = getattr(model.config, FEATURE_LAYER, None), len(stack)
    if not isinstance(taken_at, int):
        return False
    first = layers - Stack(path="", taken_at=FEATURE_LAYER).idle_layers(taken_at, layers)
    behind = first == layers or _is_recorded(trace, stack[: first + 1])
    return first > 0 and behind and not _is_recorded(trace, stack[:first])


def _is_recorded(trace: Trace, stack: nn.ModuleList) -> bool:
    """Whether the model's output does not depend on the last layer: it takes states from between layers."""
    assert trace.logits is not None
    weights = [p for p in stack[-1].parameters() if p.dim() > 1 and p.requires_grad]
    found = torch.autograd.grad(trace.logits.square().sum(), weights, retain_graph=True, allow_unused=True)
    return all(gradient is None for gradient in found)


def _depends_on(tensor: Tensor, parameters: set[int]) -> bool:
    """Whether any of the ``parameters`` made ``tensor``."""
    return any(id(getattr(node, "variable", None)) in parameters for node in makers_of(tensor))


def _one_of_each_kind(stack: nn.ModuleList) -> list[int]:
    """The first layer of every set of parameters' names."""
    kinds: dict[tuple[str, ...], int] = {}
    for index, layer in enumerate(stack):
        kinds.setdefault(tuple(name for name, _ in layer.named_parameters()), index)
    return list(kinds.values())


def _ends_of_tokens(model: PreTrainedModel, trace: Trace, stack: nn.ModuleList) -> dict[str, Any] | None:
    """Ends that treat every token by itself: one table, one norm and one linear; None where there is more."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        return None
    before, after = _around(model, stack, trace, names) or ([], [])
    if len(after) != 1 or not torch.equal(trace.of(head).argument, trace.of(model.get_submodule(after[0])).output):
        return None
    logits = _logits(model.config, trace.of(head).output, trace.logits)
    if logits is None:
        return None
    return {
        "embedding": names[id(embedding)],
        "before": tuple(before),
        "norm": after[0],
        "head": names[id(head)],
        "logits": logits,
    }


def _whole_ends(model: PreTrainedModel, trace: Trace, stacks: list[nn.ModuleList], tower: str | None) -> dict[str, Any]:
    """Ends that may look at all tokens of a sequence: the model's own forward runs them."""
    task = task_of(model.config)
    found = around(model, stacks, trace.calls, to_words=task in TOKEN_TASKS, tower=tower)
    unused = _unused(model, trace, found.bare)
    used = [name for name in found.bare if name not in unused]
    if used and task != "contrast":
        raise _unlike(model.config, f"multiplies by {used[0]} outside of the module that has it")
    logits: Logits | None = Logits()
    if found.head is not None:
        logits = _logits(model.config, trace.of(model.get_submodule(found.head)).output, trace.logits)
    if logits is None:
        raise _unlike(model.config, "changes the output of its head by no number of its config")
    return {
        "task": task,
        "ends": "whole",
        "embedding": found.embedding,
        "before": found.before,
        "after": found.after,
        "bare": tuple(used),
        "unused": unused,
        "tower": tower,
        "head": found.head,
        "logits": logits,
    }


def _unused(model: PreTrainedModel, trace: Trace, names: Sequence[str]) -> tuple[str, ...]:
    """Those of the parameters of these ``names`` that the model's output does not depend on."""
    assert trace.logits is not None
    trained = {name: p for name in names if (p := model.get_parameter(name)).requires_grad}
    total = trace.logits.square().sum()
    found = torch.autograd.grad(total, list(trained.values()), retain_graph=True, allow_unused=True) if trained else ()
    return tuple(name for name, gradient in zip(trained, found, strict=True) if gradient is None)


def _is_causal(trace: Trace, stack: nn.ModuleList) -> bool:
    """Whether no token of the stack's output depends on a later token of its input."""
    entering, leaving = trace.of(stack[0]).argument, trace.of(stack[-1]).output
    (gradient,) = torch.autograd.grad(leaving[:, 0].square().sum(), entering, retain_graph=True)
    return not bool(gradient[:, 1:].any())


def _unlike(config: PretrainedConfig, rule: str, detail: str = "") -> UnfitError:
    return UnfitError(config.model_type, rule, REMEDY, detail)


def _around(
    model: PreTrainedModel, stack: nn.ModuleList, trace: Trace, names: dict[int, str]
) -> tuple[list[str], list[str]] | None:
    """Modules with parameters of their own that run before and after the layers, beside embedding and head.

    None where a parameter is of none of these.
    """
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    first, last = trace.place(stack[0]), trace.place(stack[-1])
    within = {id(module) for module in stack.modules()}
    before: list[str] = []
    after: list[str] = []
    for index, call in enumerate(trace.calls):
        if id(call.module) in ends | within or not list(call.module.parameters(recurse=False)):
            continue
        (before if index < first else after if index > last else before).append(call.name)
    unused = {n.rpartition(".")[0] for n, p in model.named_parameters()} - {call.name for call in trace.calls}
    return None if any(not name.startswith(names[id(stack)]) for name in unused) else (before, after)


def _logits(config: PretrainedConfig, z: Tensor, logits: Tensor | None) -> Logits | None:
    """By which keys of the config the head's output ``z`` becomes the logits; None if by none."""
    assert logits is not None
    if torch.equal(z, logits):
        return Logits()
    keys = {name: value for name, value in config.to_dict().items() if isinstance(value, (int, float)) and value}
    for name, value in sorted(keys.items(), key=lambda key: not is_factor(key[0])):  # a size may be as large
        for rule, made in (
            (Logits(scale_by=name), z * value),
            (Logits(divide_by=name), z / value),
            (Logits(soft_cap=name), torch.tanh(z / value) * value),
        ):
            if made.shape == logits.shape and torch.allclose(made, logits, rtol=1e-6, atol=1e-7):
                return rule
    return None
