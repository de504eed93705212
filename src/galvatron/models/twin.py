"""A tiny random twin: a model of the same structure as a config describes, a few thousand parameters large.

Takes a config; gives a config with other sizes, and float32 models on the CPU whose every parameter is random.  What
decides the structure stays as it is (flags, activations, kinds of layers, numbers that are no sizes).
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from galvatron.core.errors import UnfitError
from galvatron.internals import call_attention

from .grids import Grids, shrink_grids
from .heads import kv_names
from .images import IMAGE_TOKENS, made_length
from .inputs import random_inputs
from .sizes import (
    CLASSES,
    HEADS,
    HIDDEN,
    IMAGE_SIZES,
    LAYERS,
    PATCH,
    SEQ_LEN,
    SIZES,
    SPAN,
    SPANS,
    STAGED,
    WORDS,
    expanded,
    is_size,
    shrunk,
)
from .staged import is_staged, shrink_stages
from .tasks import auto_class, for_task, known_task, task_of

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
HOUSEKEEPING = (
    *SPECIAL,
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "id2label",
    "label2id",
    "output_attentions",
    "output_router_logits",
    "output_hidden_states",
    "return_dict",
    "problem_type",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "initializer_range",
    "_name_or_path",
)
"""Keys of a config that change nothing in a layer."""
ROPE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "llama_4_scaling_beta")
"""What rotary tables of the default kind keep of others."""
FACTORS = ("scal", "multiplier", "cap")
NOISE = 0.1
CLASSIFICATION = ("text_classification", "image_classification")
IMAGE = 16
"""The side of an image, of 16 patches."""


def twin_inputs(twin: PretrainedConfig, rows: int = 2) -> dict[str, Tensor]:
    """Random inputs of a twin; no ids that are special."""
    return random_inputs(twin, task_of(twin), rows, SEQ_LEN, torch.Generator().manual_seed(0), lowest=2)


def run_twin(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The output that the task's loss takes."""
    takes = inspect.signature(model.forward).parameters
    outputs = model(**inputs, **({"use_cache": False} if "use_cache" in takes else {}))
    logits: Tensor = outputs.logits_per_text if "logits_per_text" in outputs else outputs.logits
    return logits


def twin_config(config: PretrainedConfig, kv_heads: int = 2, *, keep_images: bool = False) -> PretrainedConfig:
    """The same structure in other sizes, without dropout.

    ``kv_heads``: heads of keys and values, if they count; ``keep_images``: leave images and sounds at
    their size.

    Raises:
        UnfitError: it gives layers sizes of their own.
    """
    if getattr(config, "is_heterogeneous", False):
        raise UnfitError(
            config.model_type,
            "gives layers sizes of their own in its config, by per_layer_config",
            "choose a type whose layers are alike",
        )
    twin = copy.deepcopy(config)
    if hasattr(twin, "output_router_logits"):
        twin.output_router_logits = False
    given = {**twin.attribute_map, **{key: key for key in twin.to_dict()}}
    _shrink(twin, given, IMAGE_SIZES if keep_images else ())
    for name in twin.sub_configs:
        part = getattr(twin, name, None)
        if isinstance(part, PretrainedConfig):
            setattr(twin, name, twin_config(part, kv_heads, keep_images=keep_images))
    if "kv_lora_rank" in given or getattr(twin, "multi_query", None) is False:
        kv_heads = HEADS  # latent ones are as many as queries, and what a flag says are no fewer
    for name in kv_names(twin):
        if name in given and is_size(getattr(twin, name, None)):
            setattr(twin, name, kv_heads)
    task, staged = known_task(config), is_staged(config)
    if task in CLASSIFICATION:
        twin.num_labels = CLASSES
    if task == "text_classification":
        twin.pad_token_id = 1  # by which decoders find the last token
    if "image_size" in given and not keep_images:
        _set(twin, "image_size", IMAGE)
    for name in IMAGE_TOKENS:
        if isinstance(getattr(twin, name, None), int):
            setattr(twin, name, WORDS - 1)
    for name in SPECIAL:
        if getattr(twin, name, None) is not None:
            setattr(twin, name, 1)
    for index, (name, value) in enumerate(twin.to_dict().items()):
        if isinstance(value, float) and "drop" in name:
            setattr(twin, name, 0.0)
        elif value == 1 and not isinstance(value, bool) and is_factor(name):
            with suppress(StrictDataclassFieldValidationError):  # a count of times
                setattr(twin, name, 0.25 + index / 256)  # a factor of one would hide
        elif isinstance(value, float) and value and is_factor(name):
            setattr(twin, name, value * (1 + index / 1024))  # no other number's
        elif is_size(value) and value > SEQ_LEN and any(part in name for part in SPANS):
            setattr(twin, name, SPAN)
        elif isinstance(value, list) and 0 < len(value) == getattr(config, "num_hidden_layers", 0) and not staged:
            setattr(twin, name, _kinds_of(value))
        elif isinstance(value, dict) and name.startswith("rope"):
            setattr(twin, name, _plain_rope(getattr(twin, name)))
    if staged:
        shrink_stages(twin, config, keep_images=keep_images)
    if Grids.of(config) is not None:
        shrink_grids(twin, config)
    if "image_seq_length" in given and not keep_images:
        twin.image_seq_length = (IMAGE // PATCH) ** 2
        with suppress(Exception):  # of any kind: a foreign model is run
            twin.image_seq_length = made_length(twin)
    return twin


def is_factor(name: str) -> bool:
    """Whether the key of a config is called what factors and caps are."""
    return any(part in name for part in FACTORS)


def _shrink(twin: PretrainedConfig, given: Collection[str], kept: Collection[str]) -> None:
    """Give ``twin`` small sizes, by what it calls them and by what others call them; but those ``kept``."""
    hidden = getattr(twin, "hidden_size", None)
    kept = (*kept, *(STAGED if "depths" in given else ()))
    sizes = {name: getattr(twin, name, None) for name in given if twin.attribute_map.get(name, name) not in kept}
    for name, value in sorted(sizes.items(), key=lambda size: size[0] in SIZES):  # names that all have come last
        if isinstance(value, int) and is_size(value):
            setattr(twin, name, shrunk(name, value, hidden))
        elif isinstance(value, (list, tuple)) and all(is_size(v) for v in value):
            small = type(value)(shrunk(name, v, hidden) for v in value)
            if len(set(small)) == 1:  # sizes that grow from stage to stage stay
                setattr(twin, name, small)
    for name, count in expanded(twin.to_dict(), HIDDEN).items():
        setattr(twin, name, count)


def _set(config: PretrainedConfig, name: str, size: int) -> None:
    """Give a size, or of every dim where there are several."""
    value = getattr(config, name, None)
    setattr(config, name, [size] * len(value) if isinstance(value, (list, tuple)) else size)


def twin_model(twin: PretrainedConfig, seed: int = 0, attention: str = "eager") -> PreTrainedModel:
    """A model of ``twin`` in training mode; at initial values a wrong cut hides, so all parameters are random.

    ValueError if the type has no such ``attention``.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        build = auto_class(twin).from_config
        model = build(for_task(twin, task_of(twin)), dtype=torch.float32, attn_implementation=attention)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=NOISE)
    call_attention(model.config, attention)
    trained: PreTrainedModel = model.train()
    return trained


def structure_key(config: PretrainedConfig) -> str:
    """What tells structures apart: the type and what is no plain number of its twin, lists by their kinds."""
    given = twin_config(config).to_dict()
    kept = {k: _kind(v) for k, v in given.items() if k not in HOUSEKEEPING and not k.startswith("rope")}
    kept |= {name: "noise" for name, value in given.items() if "jitter" in name and value}
    if (task := task_of(config)) != "causal_lm":
        kept["task"] = task
    text = json.dumps({k: v for k, v in kept.items() if v is not None}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _kind(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, (list, tuple)):
        return sorted({json.dumps(_kind(v) if isinstance(v, (float, dict, list)) else v, default=str) for v in value})
    if isinstance(value, dict):
        return {str(k): _kind(v) for k, v in value.items()}
    return str(value)


def _kinds_of(values: list[Any]) -> list[Any]:
    """Each of the ``values`` of layers, one after the other."""
    kinds = [value for index, value in enumerate(values) if value not in values[:index]]
    return [kinds[index % len(kinds)] for index in range(LAYERS)]


def _plain_rope(value: Any) -> Any:
    """Rotary tables of the default kind: scaled ones have lists as long as a head, and are made outside the layers."""
    if not isinstance(value, dict):
        return value
    if "rope_type" not in value:
        return {name: _plain_rope(part) for name, part in value.items()}
    kept = {name: part for name, part in value.items() if name in ROPE}
    return {"rope_type": "axial" if value["rope_type"] == "axial" else "default", **kept}
