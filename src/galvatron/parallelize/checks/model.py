"""What ``parallelize`` takes: a Hugging Face causal language model that is exactly what its config describes.

Takes any object; raises one sentence before anything of it is consumed.  Layers run by their own forward, but seams
are ours: embedding, cut linears, head and loss.  Whatever a user hung on the modules (hooks, other classes, further
parameters) would be dropped there without a word, so a model that differs from its config's own is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from galvatron.core.errors import ConfigError
from galvatron.internals import has_tensor_hooks, hooks, is_compiled
from galvatron.models import adapter_of, buffers_after_head, check_trains, config_of, family_of, meta_model
from galvatron.models.lora import attach, check_adapters

from ..layers.attention import uses_attention
from ..state.weights import AFTER_HEAD, FLOATS

_RECORDER = "transformers.utils.output_capturing"  # leaves hooks behind that do nothing while nobody records
_WRAPPED = ("module", "_orig_mod")  # where DistributedDataParallel and torch.compile keep the model


def check_model(model: object) -> PreTrainedModel:
    """``model``, if it can be parallelised as it is; else ConfigError.  Nothing is changed."""
    _check_class(model)
    assert isinstance(model, PreTrainedModel)
    for problem in _modifications(model):
        raise ConfigError(problem)
    check_adapters(model)
    twin, adapter = meta_model(config_of(model)), adapter_of(model)
    if adapter is not None:
        attach(twin, adapter.name, adapter.config)
    if type(model) is not type(twin):
        raise ConfigError(
            f"model_type={model.config.model_type!r} trains as {type(twin).__name__}, got {type(model).__name__}; "
            "load the model with AutoModelForCausalLM"
        )
    for problem in _differences(model, twin):
        raise ConfigError(problem)
    check_trains(model)
    return model


def _check_class(model: object) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        inner = next((part for part in _WRAPPED if isinstance(getattr(model, part, None), nn.Module)), None)
        remedy = f"give its .{inner}" if inner else "load one with AutoModelForCausalLM, or galvatron.models.meta_model"
        raise ConfigError(f"parallelize takes a Hugging Face causal language model, got {name}; {remedy}")
    if uses_attention(model) or any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ConfigError("this model has been consumed by parallelize or fully_shard; give a new one")
    family_of(config_of(model))


def _modifications(model: PreTrainedModel) -> Iterator[str]:
    """What was hung on a model's modules and would be lost or see a part alone, a sentence each."""
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if "forward" in vars(module):
            yield f"{where} has a replaced forward, which a plan may replace again; load it without device_map"
        if any(hook.__module__ != _RECORDER for hook in hooks(module)):
            yield f"{where} has hooks, which would see a rank's part alone; remove them before parallelize"
        if is_compiled(module):
            yield f"{where} is compiled, which fixes shapes that a plan changes; give the model as it was before"
        if getattr(module, "gradient_checkpointing", False):
            yield "gradient checkpointing is the plan's to decide (recompute); disable it on the model"
        if isinstance(module, nn.Embedding):
            yield from _lookup_problems(where, module)
    for name, parameter in model.named_parameters():
        if has_tensor_hooks(parameter):
            yield f"parameter {name} has hooks, which would be lost with it; remove them before parallelize"
        if parameter.dtype not in FLOATS:
            yield f"parameter {name} is {parameter.dtype}, whose numbers need scales; load the model unquantised"
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            yield f"buffer {name} is on meta, without values; make the model with galvatron.models.meta_model"
    for name, buffer in buffers_after_head(model).items():
        if buffer.any():
            yield f"{name} is {AFTER_HEAD}"


def _lookup_problems(where: str, embedding: nn.Embedding) -> Iterator[str]:
    """What an embedding does that parts of a batch cannot do alike."""
    for name in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(embedding, name):
            value = getattr(embedding, name)
            yield f"{where} has {name}={value}, which works on whole batches or weights; unset it"


def _differences(model: PreTrainedModel, twin: PreTrainedModel) -> Iterator[str]:
    """Where ``model`` is not what its config describes (``twin``), a sentence each."""
    name = f"{type(model).__name__} of this config"
    yield from _unequal(f"a parameter of {name}", _shapes(model.named_parameters()), _shapes(twin.named_parameters()))
    yield from _unequal(f"a buffer of {name}", _shapes(model.named_buffers()), _shapes(twin.named_buffers()))
    yield from _unequal(f"a module of {name}", _classes(model), _classes(twin))


def _unequal(what: str, found: Mapping[str, str], expected: Mapping[str, str]) -> Iterator[str]:
    for name in found.keys() - expected.keys():
        yield f"{name} {found[name]} is not {what}: it would be neither initialised nor run; remove it"
    for name, value in expected.items():
        if found.get(name) != value:
            yield f"{name} {value} is {what}, but here it is {found.get(name, 'missing')}; mend the model or its config"


def _shapes(tensors: Iterator[tuple[str, torch.Tensor]]) -> dict[str, str]:
    return {name: str(list(tensor.shape)) for name, tensor in tensors}


def _classes(model: PreTrainedModel) -> dict[str, str]:
    return {name: f"({type(module).__module__}.{type(module).__qualname__})" for name, module in model.named_modules()}
