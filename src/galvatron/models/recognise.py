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
from galvatron.core.family import Family, Logits, Stack
from galvatron.internals import call_attention

from .layouts import Call, experts_of, regions_of
from .twin import SEQ_LEN, WORDS, twin_config, twin_model

WATCHED, MAX_REASON = "galvatron-watched", 200
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")


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
        raise _unlike(config, f"cannot be run as a tiny causal language model ({why})") from None
    names = {id(module): name for name, module in model.named_modules()}
    stack = _stack(model, trace)
    layers = names[id(stack)]
    if len({tuple(name for name, _ in layer.named_parameters()) for layer in stack}) != 1:
        raise _unlike(config, "has layers of several kinds")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise _unlike(config, "has no embedding that is a table, or no head that is a linear")
    before, after = _around(model, stack, trace, names)
    if len(after) != 1:
        raise _unlike(config, f"has {', '.join(after) or 'nothing'} between its layers and its head, not one norm")
    norm = model.get_submodule(after[0])
    if not torch.equal(trace.of(head).argument, trace.of(norm).output):
        raise _unlike(config, f"changes the output of {after[0]} before its head")
    if not (asks := _asks_for_attention(config)):
        raise _unlike(config, "computes attention by itself, without asking for a function")
    inside = [call for call in trace.calls if call.name.startswith(f"{layers}.0.")]
    regions = regions_of(inside, trace.of(stack[0]).argument, f"{layers}.0.", _head_count(model))
    experts = experts_of(stack[0], inside, f"{layers}.0.", model.config.hidden_size)
    return Family(
        model_type=config.model_type,
        decoder=layers.rpartition(".")[0],
        stacks=(Stack(path=layers, regions=regions, experts=experts),),
        embedding=names[id(embedding)],
        before=tuple(before),
        norm=after[0],
        head=names[id(head)],
        logits=_logits(model.config, trace.of(head).output, trace.logits),
        asks_for_attention=asks,
    )


def _unlike(config: PretrainedConfig, why: str) -> ConfigError:
    return ConfigError(
        f"model_type={config.model_type!r} {why}; galvatron trains chains of layers between an embedding and a head"
    )


def _head_count(model: PreTrainedModel) -> int:
    heads: int = model.config.num_attention_heads
    return heads


def _traced(model: PreTrainedModel) -> _Trace:
    trace, handles = _Trace(), []
    for name, module in model.named_modules():

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            argument = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(argument, Tensor) and isinstance(value, Tensor):
                trace.calls.append(Call(name, module, argument, value))

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    ids = torch.randint(WORDS, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    trace.logits = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return trace


def _stack(model: PreTrainedModel, trace: _Trace) -> nn.ModuleList:
    """The one list of modules of a class, each of two matrices or more, that hand hidden states on."""
    called = {id(call.module): call for call in trace.calls}
    found = []
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or any(id(m) not in called for m in module):
            continue
        calls = [called[id(member)] for member in module]
        passes_on = all(later.argument is earlier.output for earlier, later in itertools.pairwise(calls))
        if len({type(m) for m in module}) == 1 and passes_on and sum(p.dim() > 1 for p in module[0].parameters()) > 1:
            found.append(module)
    if len(found) != 1:
        raise _unlike(model.config, f"has {len(found)} stacks of equal layers, not one")
    return found[0]


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
            model(input_ids=torch.zeros(1, SEQ_LEN, dtype=torch.long), use_cache=False)
    except Exception:  # an attention of the type's own that knows no other name
        return False
    return bool(asked)
