"""Which modules of a Hugging Face model are embedding, layers and head, and how each may be cut.

Takes Hugging Face configs and models; gives Family records, ModelSpec and models whose parameters live on
the meta device.  What is not known is recognised by running a tiny twin.  Knows nothing of processes, plans or costs.
"""

from galvatron.core.family import Experts, Family, Region

from .buffers import buffers_after_head, buffers_within, lasting_buffers
from .chain import Link, argument_names, arguments_by_name, chain_of, experts_in, regions_in, score_table
from .family import family_of
from .freeze import check_trains, freeze_parameters
from .images import image_token
from .initialize import InitialWeights
from .inputs import blank_inputs, random_inputs, words_of
from .load import class_names, described_shapes, load_config, meta_model, name_classes
from .lora import Adapter, adapter_of
from .shapes import Reached, emptied, entering_tokens
from .spec import build_spec, model_to_train, spec_of
from .tasks import auto_class, config_of, for_task, task_of, types_of_tasks
from .twin import structure_key, twin_config, twin_model

__all__ = [
    "Adapter",
    "Experts",
    "Family",
    "InitialWeights",
    "Link",
    "Reached",
    "Region",
    "adapter_of",
    "argument_names",
    "arguments_by_name",
    "auto_class",
    "blank_inputs",
    "buffers_after_head",
    "buffers_within",
    "build_spec",
    "chain_of",
    "check_trains",
    "class_names",
    "config_of",
    "described_shapes",
    "emptied",
    "entering_tokens",
    "experts_in",
    "family_of",
    "for_task",
    "freeze_parameters",
    "image_token",
    "lasting_buffers",
    "load_config",
    "meta_model",
    "model_to_train",
    "name_classes",
    "random_inputs",
    "regions_in",
    "score_table",
    "spec_of",
    "structure_key",
    "task_of",
    "twin_config",
    "twin_model",
    "types_of_tasks",
    "words_of",
]
