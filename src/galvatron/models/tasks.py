"""The task of a model, by its architecture: what transformers calls a model with a head.

Takes configs, models and tasks; gives transformers' classes.  A config says its architecture by ``architectures``, as
saved models do; without it a type trains for what it is known for.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForZeroShotImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from galvatron.core.errors import ConfigError, UnfitError
from galvatron.core.tasks import Task, check_head
from galvatron.internals import model_mapping, model_types

CLASSES: dict[Task, Any] = {
    "vision_language": AutoModelForImageTextToText,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
    "speech_to_text": AutoModelForSpeechSeq2Seq,
    "masked_lm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
    "contrast": AutoModelForZeroShotImageClassification,
    "image_classification": AutoModelForImageClassification,
    "text_classification": AutoModelForSequenceClassification,
}
"""transformers' classes; a type trains for the first task that has one for it, if its config names none."""


def task_of(config: PretrainedConfig) -> Task:
    """What the model of ``config`` is trained for.

    Raises:
        UnfitError: transformers has no model of this type for any task, or its architecture has a head of none.
    """
    named = (getattr(config, "architectures", None) or [""])[0]
    possible = {task: model for task in CLASSES if (model := _class_for(config, task)) is not None}
    for task, model in possible.items():
        if model.__name__ == named:
            return task
    check_head(named)
    usual = [task for task in possible if _suits(config, task)]
    if not usual:
        rule, tasks = "has no model for any task in transformers", ", ".join(CLASSES)
        raise UnfitError(config.model_type, rule, "choose another type", tasks)
    return usual[0]


def known_task(config: PretrainedConfig) -> Task | None:
    """As ``task_of``; None where there is none: of a part of a model."""
    try:
        return task_of(config)
    except ConfigError:
        return None


def types_of_tasks() -> list[str]:
    """Every type of model that transformers has a class for one of these tasks."""
    return sorted({name for model in CLASSES.values() for name in model_types(model)})


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that builds the model of ``config`` for its task."""
    return CLASSES[task_of(config)]


def class_for(config: PretrainedConfig, task: Task) -> Any:
    """The class of transformers' models of ``config`` for a task that it has one for."""
    return _class_for(config, task)


def for_task(config: PretrainedConfig, task: Task) -> PretrainedConfig:
    """A copy of ``config`` that names its architecture for ``task``.

    Raises:
        ConfigError: transformers has none.
    """
    model = _class_for(config, task)
    if model is None:
        having = ", ".join(name for name in CLASSES if _class_for(config, name) is not None)
        raise ConfigError(f"model_type={config.model_type!r} has no model for task={task}; choose one of {having}")
    named = copy.deepcopy(config)
    named.architectures = [model.__name__]
    return named


def config_of(model: PreTrainedModel) -> PretrainedConfig:
    """A copy of ``model``'s config that names its architecture."""
    named = copy.deepcopy(model.config)
    named.architectures = [type(model).__name__]
    return named


def _class_for(config: PretrainedConfig, task: Task) -> type | None:
    mapping = model_mapping(CLASSES[task])
    if type(config) not in mapping:
        return None
    found: Any = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _suits(config: PretrainedConfig, task: Task) -> bool:
    """Many types have a head for other tasks than they are known for."""
    if task == "seq2seq_lm":
        return bool(config.is_encoder_decoder)
    return task != "masked_lm" or not (config.is_encoder_decoder or getattr(config, "is_decoder", False))
