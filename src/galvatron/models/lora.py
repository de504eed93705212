"""Models with LoRA adapters by peft: made, taken apart and checked.

Takes Hugging Face models, or peft's around them; gives what of their adapters training, checkpoints and exports need.
peft is imported where adapters are made; models that have some were made with it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from galvatron.core.errors import ConfigError
from galvatron.core.lora import NAME, Lora
from galvatron.core.tasks import Task
from galvatron.core.words import shown

from .family import family_of
from .load import meta_model
from .tasks import config_of, task_of

FREE = frozenset(
    {
        "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights",
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "megatron_core",
    }
)  # fmt: skip
"""What peft's LoraConfig may say as it likes; all else changes what an adapter computes, or what else is trained."""
TASK_TYPES: Mapping[Task, str] = {"causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM"}
"""What peft calls a task, of those whose models it wraps without a new head."""
PLAIN_STARTS = (True, False, "gaussian")
"""Values of ``init_lora_weights`` that leave the base model's weights as they are."""


@dataclass(frozen=True)
class Adapter:
    """A model's one adapter.

    Attributes:
        name: what peft calls it.
        config: peft's LoraConfig, as its ``adapter_config.json`` has it.
        scaling: what B A counts for, by the path of the linear.
        transposed: linears whose weights are [inputs, outputs].
    """

    name: str
    config: Mapping[str, Any]
    scaling: Mapping[str, float]
    transposed: frozenset[str]

    @property
    def json(self) -> str:
        """The text of ``adapter_config.json``."""
        return json.dumps({**self.config, "inference_mode": True}, indent=2, sort_keys=True) + "\n"


def adapter_like(config: PretrainedConfig, described: Mapping[str, Any], name: str) -> Adapter:
    """The adapter, called ``name``, of a model of ``config``, as an ``adapter_config.json`` describes it."""
    model = meta_model(config)
    attach(model, name, described)
    found = adapter_of(model)
    assert found is not None
    return found


def wrapped(model: object) -> object:
    """The Hugging Face model in which ``get_peft_model`` put adapters; anything else as it is.

    Raises:
        ConfigError: what peft added is not in it, but around it.
    """
    if not (has_adapters(model) and hasattr(model, "get_base_model")):
        return model
    inner: object = model.get_base_model()
    if not has_adapters(inner):
        kinds = ", ".join(_kind(config) for config in model.peft_config.values())  # type: ignore[attr-defined]
        raise _other_method(kinds)
    return inner


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _other_method(kind: str) -> ConfigError:
    return ConfigError(f"of peft's methods LoRA can be trained, got {kind}; use a LoraConfig")


def has_adapters(model: object) -> bool:
    """Whether peft has been at ``model``."""
    return hasattr(model, "peft_config")


def base_linear(module: nn.Module) -> nn.Module:
    """The linear itself, whether an adapter is around it or not."""
    base: nn.Module = getattr(module, "base_layer", module)
    return base


def adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, peft's module) of every linear of ``model`` that has an adapter."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def attach_lora(model: PreTrainedModel, lora: Lora, origin: str = "") -> None:
    """Freeze ``model`` and give it adapters; ``origin``: what an exported adapter will name as its base model.

    Raises:
        ConfigError: it has no linear of such a name, or peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ConfigError("LoRA needs peft, which is not installed; pip install 'galvatron[lora]'") from None
    own = config_of(model)
    targets = lora.targets(family_of(own))
    settings = lora.model_dump(exclude={"target_modules"})
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    config = LoraConfig(
        **settings, target_modules=list(targets), fan_in_fan_out=transposed, task_type=TASK_TYPES.get(task_of(own))
    )
    model.add_adapter(config, NAME)
    config.base_model_name_or_path = origin or None


def attach(model: PreTrainedModel, name: str, config: Mapping[str, Any]) -> None:
    """Give ``model`` an adapter as an ``adapter_config.json`` describes it."""
    from peft import LoraConfig

    described = LoraConfig(**{**copy.deepcopy(dict(config)), "inference_mode": False})
    model.add_adapter(described, name)
    described.base_model_name_or_path = config["base_model_name_or_path"]  # transformers puts in its own


def adapter_of(model: PreTrainedModel) -> Adapter | None:
    """The adapter of a model that ``check_adapters`` has let pass; None where it has none."""
    if not has_adapters(model):
        return None
    configs: Any = model.peft_config
    ((name, config),) = configs.items()
    modules = dict(adapted(model))
    return Adapter(
        name=name,
        config=_plain(config),
        scaling={path: float(module.scaling[name]) for path, module in modules.items()},
        transposed=frozenset(path for path, module in modules.items() if isinstance(base_linear(module), Conv1D)),
    )


def _plain(config: Any) -> dict[str, Any]:
    """peft's own JSON of a config: sets as lists, enumerations by value."""
    return {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.to_dict().items()}


def check_adapters(model: PreTrainedModel) -> None:
    """Raise ConfigError unless what peft did to ``model`` is one plain LoRA adapter on linears of its layers."""
    if not has_adapters(model):
        return
    configs: Any = model.peft_config
    if len(configs) != 1:
        raise ConfigError(f"one adapter can be trained, got {', '.join(configs)}; delete the others")
    ((name, config),) = configs.items()
    if _kind(config) != "LORA":
        raise _other_method(_kind(config))
    for problem in (*_setting_problems(config), *_module_problems(model, name)):
        raise ConfigError(problem)


def _setting_problems(config: Any) -> Iterator[str]:
    usual = type(config)().to_dict()
    for name, value in config.to_dict().items():
        if name not in FREE and (value or None) != (usual.get(name) or None):
            yield f"LoRA with {name}={shown(value)} cannot be trained; leave it at {shown(usual.get(name))}"
    if config.init_lora_weights not in PLAIN_STARTS:
        yield (
            f"init_lora_weights={shown(config.init_lora_weights)} changes the base model too, so that an adapter alone "
            "would not say what was trained; choose True or 'gaussian'"
        )


def _module_problems(model: PreTrainedModel, name: str) -> Iterator[str]:
    stacks = tuple(f"{stack.path}." for stack in family_of(config_of(model)).stacks)
    for path, module in adapted(model):
        base = base_linear(module)
        if type(base) not in (nn.Linear, Conv1D):
            yield (
                f"{path} ({type(base).__name__}) has an adapter, but plain linears alone can have one; leave it out of "
                "target_modules"
            )
        if not path.startswith(stacks):
            yield f"{path} has an adapter, but linears of layers alone can have one; leave it out of target_modules"
        if module.merged or module.disable_adapters or module.active_adapters != [name]:
            yield f"the adapter of {path} is merged or not active; unmerge it and set_adapter({name!r})"


def start_adapters(model: PreTrainedModel) -> None:
    """Draw every A and zero every B, as peft does where it makes them."""
    for _, module in adapted(model):
        for name in module.lora_A:
            configs: Any = model.peft_config
            module.reset_lora_parameters(name, configs[name].init_lora_weights)
