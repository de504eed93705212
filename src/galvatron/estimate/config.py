"""ModelSpec of a Hugging Face ``config.json``, from its numbers alone.

Takes a configuration as a mapping; gives every parameter with its tensor-parallel cut: of families that are trained by
their data (``core.family``), and then it equals ``galvatron.models.build_spec``; of others by a function each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from galvatron.core.defects import sentence
from galvatron.core.errors import ConfigError
from galvatron.core.known import known_families, known_family
from galvatron.core.model import ModelSpec
from galvatron.core.tasks import Task, task_named
from galvatron.core.words import shown

from .encoders import swin
from .known import spec_of_known
from .parts import Config

Family = Callable[[Config, str], ModelSpec]
# Defaults are those of the library's config classes (transformers 5), for keys that files leave out.
FAMILIES: dict[str, tuple[Family, Task, dict[str, Any]]] = {
    "swin": (swin, "image_classification", {"num_channels": 3, "patch_size": 4, "window_size": 7}),
}


def spec_of_config(config: Mapping[str, Any], name: str, task: Task | None = None) -> ModelSpec:
    """The model that ``config`` describes, called ``name``, for ``task``, by default that of its architecture.

    Sequences of vision models are patches: ``max_seq_len`` is (image / patch)², one more with a class token, and
    ``vocab_size`` is the number of classes.

    Raises:
        ConfigError: its family is unknown or has no shapes for the task, a size is missing, or sizes contradict each
            other.
    """
    model_type = config.get("model_type")
    types = {*FAMILIES, *(known.family.model_type for known in known_families().values())}
    if not isinstance(model_type, str) or model_type not in types:
        raise ConfigError(
            f"model_type={shown(model_type)} has no shapes here, only {', '.join(sorted(types))}; profile the model "
            "instead, which reads its code"
        )
    task = task or task_named(config)
    found = known_family(model_type, task)
    known = found if found is not None and found.has_shapes else None
    if known is None and (model_type not in FAMILIES or task not in (None, FAMILIES[model_type][1])):
        tasks = sorted(
            known.family.task for known in known_families().values() if known.family.model_type == model_type
        )
        raise ConfigError(
            f"task={task} of a {model_type} config has no shapes here, only "
            f"{', '.join(tasks) or 'its own'}; profile the model instead, which reads its code"
        )
    try:
        if known is not None:
            return spec_of_known(known, Config(config), name)
        family, _, defaults = FAMILIES[model_type]
        return family(Config(config, **defaults), name)
    except ValidationError as failure:
        raise ConfigError(f"model {name}: {sentence(ModelSpec, failure)}; give a Hugging Face config.json") from None
