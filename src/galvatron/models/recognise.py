"""Recognition: which modules of an unknown type are embedding, layers, norm and head, and how a layer can be cut.

Takes a config; runs its tiny twin once and watches.  The stack is the list of modules that hand their output on one to
the next; what is cut is found from which linear feeds which, and how from which outputs of the one reach which inputs
of the other.  A guess: the gradients of ``galvatron.parallelize.proof`` decide.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from galvatron.core.errors import ConfigError
from galvatron.core.family import Experts, Family, Logits, Region, Stack
from galvatron.core.tasks import TOKEN_TASKS
from galvatron.internals import call_attention

from .chain import arguments_by_name
from .ends import around
from .heads import heads_in
from .layouts import Call, experts_of, regions_of
from .tasks import task_of
from .twin import run_twin, twin_config, twin_inputs, twin_model

WATCHED, MAX_REASON = "galvatron-watched", 200
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn")


@dataclass
class _Trace:
    """What happened in one forward pass: modules with parameters of their own, in the order they were called."""

    calls: list[Call] = field(default_factory=list)
    logits: Tensor | None = None

    def of(self, module: nn.Module) -> Call:
        return next(call for call in self.calls if call.module is module)

    def place(self, module: nn.Module) -> int:
        return next(i for i, call in enumerate(self.calls) if call.module is module)


def recognise(config: PretrainedConfig) -> Family:
    """The family of ``config``'s type and flags.

    Raises:
        ConfigError: it is no chain of equal layers between one embedding and one head, in words.
    """
    twin = twin_config(config)
    for name in ACTIVATIONS:
        if isinstance(getattr(twin, name, None), str):
            setattr(twin, name, "gelu")  # every unit lets something through
    try:
        model = twin_model(twin)
        trace = _traced(model)
    except Exception as error:  # of any kind: a foreign model is built and run
        lines = str(error).strip().splitlines()
        why = lines[0][:MAX_REASON] if lines else type(error).__name__
        raise _unlike(config, f"cannot be run as a tiny model ({why})") from None
    stacks = _stacks(model, trace)
    if not (asks := _asks_for_attention(config)):
        raise _unlike(config, "computes attention by itself, without asking for a function")
    found = tuple(_described(model, trace, stack, stacks[:nth]) for nth, stack in enumerate(stacks))
    if len(stacks) == 1 and task_of(config) == "causal_lm":
        ends = _ends_of_tokens(model, trace, stacks[0])
    else:
        ends = _whole_ends(model, trace, stacks)
    return Family(model_type=config.model_type, stacks=found, asks_for_attention=asks, **ends)


def _described(model: PreTrainedModel, trace: _Trace, stack: nn.ModuleList, before: list[nn.ModuleList]) -> Stack:
    """A stack, with the regions of every kind of layer that it has; ``before``: those that end before it begins."""
    path = next(name for name, module in model.named_modules() if module is stack)
    side = _side(trace, stack, before)
    regions: list[Region] = []
    experts: list[Experts | None] = []
    is_cuttable = True
    for index in _one_of_each_kind(stack):
        prefix = f"{path}.{index}."
        inside = [call for call in trace.calls if call.name.startswith(prefix)]
        found = regions_of(trace.of(stack[index]), inside, prefix, heads_in(stack[index], model.config)["heads"], side)
        regions += [region for region in found if region not in regions]
        experts.append(experts_of(stack[index], inside, prefix, trace.of(stack[index]).argument.shape[-1]))
        is_cuttable &= bool(found)
    if any(other != experts[0] for other in experts):
        raise _unlike(model.config, "has layers with experts and layers without")
    return Stack(
        path=path,
        regions=tuple(regions) if is_cuttable and len({region.row for region in regions}) == len(regions) else (),
        experts=experts[0],
        outputs=trace.of(stack[0]).outputs,
        causal=_is_causal(trace, stack),
        side=side,
        biased=any(hasattr(module, "compute_bias") for module in stack.modules()),
        recorded=_is_recorded(trace, stack),
    )


def _side(trace: _Trace, stack: nn.ModuleList, before: list[nn.ModuleList]) -> str | None:
    """The argument of all layers that carries what an earlier stack ends with."""
    first, second = trace.of(stack[0]), trace.of(stack[1])
    parameters = {id(p) for other in before for p in other.parameters()}
    for name, tensor in first.named.items():
        if tensor is not first.argument and second.named.get(name) is tensor and _depends_on(tensor, parameters):
            return name
    return None


def _is_recorded(trace: _Trace, stack: nn.ModuleList) -> bool:
    """Whether the model's output does not depend on the last layer: it takes states from between layers."""
    assert trace.logits is not None
    weights = [p for p in stack[-1].parameters() if p.dim() > 1]
    found = torch.autograd.grad(trace.logits.square().sum(), weights, retain_graph=True, allow_unused=True)
    return all(gradient is None for gradient in found)


def _depends_on(tensor: Tensor, parameters: set[int]) -> bool:
    """Whether any of the ``parameters`` made ``tensor``."""
    waiting, seen = [tensor.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in parameters:
            return True
        waiting += [following for following, _ in node.next_functions]
    return False


def _one_of_each_kind(stack: nn.ModuleList) -> list[int]:
    """The first layer of every set of parameters' names."""
    kinds: dict[tuple[str, ...], int] = {}
    for index, layer in enumerate(stack):
        kinds.setdefault(tuple(name for name, _ in layer.named_parameters()), index)
    return list(kinds.values())


def _ends_of_tokens(model: PreTrainedModel, trace: _Trace, stack: nn.ModuleList) -> dict[str, Any]:
    """Ends that treat every token by itself."""
    config, names = model.config, {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise _unlike(config, "has no embedding that is a table, or no head that is a linear")
    before, after = _around(model, stack, trace, names)
    if len(after) != 1:
        raise _unlike(config, f"has {', '.join(after) or 'nothing'} between its layers and its head, not one norm")
    norm = model.get_submodule(after[0])
    if not torch.equal(trace.of(head).argument, trace.of(norm).output):
        raise _unlike(config, f"changes the output of {after[0]} before its head")
    return {
        "decoder": names[id(stack)].rpartition(".")[0],
        "embedding": names[id(embedding)],
        "before": tuple(before),
        "norm": after[0],
        "head": names[id(head)],
        "logits": _logits(config, trace.of(head).output, trace.logits),
    }


def _whole_ends(model: PreTrainedModel, trace: _Trace, stacks: list[nn.ModuleList]) -> dict[str, Any]:
    """Ends that may look at all tokens of a sequence: the model's own forward runs them."""
    task = task_of(model.config)
    found = around(model, stacks, trace.calls, to_words=task in TOKEN_TASKS)
    if found.bare and task != "contrast":
        raise _unlike(model.config, f"has parameters that no module around its layers has ({found.bare[0]})")
    head = None if found.head is None else model.get_submodule(found.head)
    return {
        "task": task,
        "ends": "whole",
        "embedding": found.embedding,
        "before": found.before,
        "after": found.after,
        "bare": found.bare,
        "head": found.head,
        "logits": Logits() if head is None else _logits(model.config, trace.of(head).output, trace.logits),
    }


def _is_causal(trace: _Trace, stack: nn.ModuleList) -> bool:
    """Whether no token of the stack's output depends on a later token of its input."""
    entering, leaving = trace.of(stack[0]).argument, trace.of(stack[-1]).output
    (gradient,) = torch.autograd.grad(leaving[:, 0].square().sum(), entering, retain_graph=True)
    return not bool(gradient[:, 1:].any())


def _unlike(config: PretrainedConfig, why: str) -> ConfigError:
    return ConfigError(
        f"model_type={config.model_type!r} {why}; galvatron trains chains of layers between an embedding and a head"
    )


def _traced(model: PreTrainedModel) -> _Trace:
    trace, handles = _Trace(), []
    for name, module in model.named_modules():

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            argument = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            value, outputs = (output[0], len(output)) if isinstance(output, tuple) else (output, 0)
            if isinstance(argument, Tensor) and isinstance(value, Tensor):
                named = {n: v for n, v in arguments_by_name(module, args, kwargs).items() if isinstance(v, Tensor)}
                trace.calls.append(Call(name, module, argument, value, outputs, named))

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    trace.logits = run_twin(model, twin_inputs(model.config))
    for handle in handles:
        handle.remove()
    return trace


def _stacks(model: PreTrainedModel, trace: _Trace) -> list[nn.ModuleList]:
    """The lists of modules of a class, each of two matrices or more, that hand hidden states on; as they are called."""
    called = {id(call.module): call for call in trace.calls}
    found = []
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or any(id(m) not in called for m in module):
            continue
        calls = [called[id(member)] for member in module]
        passes_on = all(later.argument is earlier.output for earlier, later in itertools.pairwise(calls))
        if len({type(m) for m in module}) == 1 and passes_on and sum(p.dim() > 1 for p in module[0].parameters()) > 1:
            found.append(module)
    if not found:
        raise _unlike(model.config, "has no stack of equal layers")
    return sorted(found, key=lambda stack: trace.place(stack[0]))


def _around(
    model: PreTrainedModel, stack: nn.ModuleList, trace: _Trace, names: dict[int, str]
) -> tuple[list[str], list[str]]:
    """Modules with parameters of their own that run before and after the layers, beside embedding and head."""
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
    if outside := sorted(name for name in unused if not name.startswith(names[id(stack)])):
        raise _unlike(model.config, f"has parameters that nothing calls ({outside[0]})")
    return before, after


def _logits(config: PretrainedConfig, z: Tensor, logits: Tensor | None) -> Logits:
    """By which keys of the config the head's output ``z`` becomes the logits."""
    assert logits is not None
    if torch.equal(z, logits):
        return Logits()
    keys = {name: value for name, value in config.to_dict().items() if isinstance(value, (int, float)) and value}
    for name, value in keys.items():
        for rule, made in (
            (Logits(scale_by=name), z * value),
            (Logits(divide_by=name), z / value),
            (Logits(soft_cap=name), torch.tanh(z / value) * value),
        ):
            if torch.allclose(made, logits, rtol=1e-6, atol=1e-7):
                return rule
    raise _unlike(config, "changes the output of its head by no number of its config")


def _asks_for_attention(config: PretrainedConfig) -> bool:
    """Whether layers call the attention that their config names; some have their own alone."""
    asked: list[nn.Module] = []

    def watch(module: nn.Module, query_BNSD: Tensor, *_: Any, **__: Any) -> Any:
        asked.append(module)
        return query_BNSD.transpose(1, 2).contiguous(), None

    AttentionInterface.register(WATCHED, watch)
    model = twin_model(twin_config(config))
    for own in {
        id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PretrainedConfig)
    }.values():
        call_attention(own, WATCHED)
    try:
        with torch.no_grad():
            run_twin(model, twin_inputs(model.config))
    except Exception:  # an attention of the type's own that knows no other name
        return False
    return bool(asked)
