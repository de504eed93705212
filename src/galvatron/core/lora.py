"""LoRA: beside a frozen linear W, two small trained matrices, W x + s · B A x (Hu et al. 2021).

Takes settings by the names that peft gives them; gives which linears get adapters, and how tensor parallelism cuts
these: beside a column-cut W every rank has its rows of B and all of A, beside a row-cut one its columns of A and all of
B, so that both products are partial as W's own is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal, Self

from pydantic import Field, StrictBool, field_validator

from .errors import ConfigError
from .family import Family, Region
from .model import Cut, ModelSpec, ParameterSpec, UnitSpec
from .numbers import Count
from .records import Record, validate
from .words import did_you_mean, shown

NAME = "default"
"""What peft calls an adapter that was given no name."""
ALL: Final = "all-linear"


class Lora(Record):
    """Adapters of a rank ``r``, whose output counts ``lora_alpha`` / r (/ sqrt(r) with ``use_rslora``).

    ``target_modules``: linears of layers by name (``q_proj``) or the end of their path (``self_attn.q_proj``), or
    ``all-linear``.  ``lora_dropout`` falls on what enters A.
    """

    r: Count = 8
    lora_alpha: Count = 8
    target_modules: Literal["all-linear"] | tuple[str, ...] = ALL
    lora_dropout: float = Field(default=0.0, strict=True, ge=0, lt=1)
    use_rslora: StrictBool = False

    @field_validator("target_modules")
    @classmethod
    def _names_something(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not all(value) or not value:
            raise ValueError(f"target_modules names no module; name some, or write {ALL}")
        return value

    @classmethod
    def parse(cls, text: str) -> Self:
        """``r=16,lora_alpha=32,target_modules=q_proj+v_proj``; raises ConfigError."""
        given: dict[str, Any] = {}
        for part in text.split(","):
            name, equals, value = (word.strip() for word in part.partition("="))
            if name not in cls.model_fields or not equals or name in given:
                near = "; " if name in cls.model_fields else did_you_mean(name, cls.model_fields)
                raise ConfigError(
                    f"--lora takes NAME=VALUE, once for a name, got {shown(part)}{near}"
                    f"names are {', '.join(cls.model_fields)}"
                )
            given[name] = _value(name, value)
        return validate(cls, given, f"--lora {text}", ConfigError)

    def __str__(self) -> str:
        """As ``parse`` takes it."""
        return ",".join(f"{name}={_text(value)}" for name, value in self.model_dump().items())

    def targets(self, family: Family) -> tuple[str, ...]:
        """The linears of a layer that get adapters, by path, in the order of the forward pass; raises ConfigError."""
        linears = list(dict.fromkeys(path for region in _regions(family) for path in (*region.columns, region.row)))
        if self.target_modules == ALL and linears:
            return tuple(linears)
        for target in () if self.target_modules == ALL else self.target_modules:
            if not any(_is_called(path, target) for path in linears):
                raise ConfigError(
                    f"target_modules: {shown(target)} is no linear of layers of {family.model_type} that can have "
                    f"adapters; choose among {', '.join(linears) or 'none'} (embeddings, heads and experts cannot)"
                )
        if not linears:
            raise ConfigError(
                f"layers of {family.model_type} have no linears that are known; give parallelize a model with adapters"
            )
        return tuple(path for path in linears if any(_is_called(path, target) for target in self.target_modules))


def _value(name: str, text: str) -> Any:
    """As a job file would give it."""
    if name == "target_modules":
        return ALL if text == ALL else tuple(text.split("+"))
    if name == "use_rslora":
        return {"true": True, "false": False}.get(text.lower(), text)
    if re.fullmatch(r"\d{1,9}", text, re.ASCII):
        return int(text)
    return float(text) if re.fullmatch(r"\d{0,9}\.\d{1,9}", text, re.ASCII) else text


def _text(value: Any) -> str:
    return (
        "+".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _regions(family: Family) -> Iterator[Region]:
    return (region for stack in family.stacks for region in stack.regions)


def _is_called(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def plain_name(parameter: str) -> str:
    """The name that a linear's own parameter has in the model without adapters."""
    return parameter.replace(".base_layer.", ".")


def is_adapters(parameter: str) -> bool:
    """Whether a parameter of that name is an adapter's A or B."""
    return ".lora_A." in parameter or ".lora_B." in parameter


def adapter_cuts(cut: Cut | None, *, is_row: bool) -> tuple[Cut | None, Cut | None]:
    """How A [r, inputs] and B [outputs, r] are cut beside a weight that is cut so."""
    if cut is None:
        return None, None
    along = cut.model_copy(update={"dim": 1 if is_row else 0})
    return (along, None) if is_row else (None, along)


def with_adapters(spec: ModelSpec, family: Family, lora: Lora) -> ModelSpec:
    """``spec`` with everything frozen, and with trained adapters in every layer; raises ConfigError."""
    rows = {region.row for region in _regions(family)}
    targets = {path: path in rows for path in lora.targets(family)}
    layers = tuple(
        kind.model_copy(update={"parameters": tuple(_adapted(kind.parameters, targets, lora))}) for kind in spec.layers
    )
    ends = {
        name: UnitSpec(parameters=tuple(_frozen(p) for p in spec.unit(name).parameters))
        for name in ("embedding", "head")
    }
    return spec.model_copy(update={"layers": layers, **ends})


def _adapted(parameters: Iterable[ParameterSpec], targets: dict[str, bool], lora: Lora) -> Iterator[ParameterSpec]:
    """A layer's parameters in the order in which peft's modules have them: the linear's own, then A and B."""
    waiting: tuple[ParameterSpec, ...] = ()
    owner = ""
    for parameter in map(_frozen, parameters):
        path, _, attribute = parameter.name.rpartition(".")
        if path != owner:
            yield from waiting
            waiting, owner = (), path
        if path not in targets:
            yield parameter
            continue
        yield parameter.model_copy(update={"name": f"{path}.base_layer.{attribute}"})
        if attribute == "weight":
            waiting = _adapter(parameter, path, targets[path], lora)
    yield from waiting


def _adapter(weight: ParameterSpec, path: str, is_row: bool, lora: Lora) -> tuple[ParameterSpec, ParameterSpec]:
    # a weight whose cut's dim is another than torch's linears have it is GPT-2's, [inputs, outputs]
    is_transposed = weight.cut is not None and weight.cut.dim == (0 if is_row else 1)
    outputs, inputs = reversed(weight.shape) if is_transposed else weight.shape
    cuts = adapter_cuts(weight.cut, is_row=is_row)
    return (
        ParameterSpec(name=f"{path}.lora_A.{NAME}.weight", shape=(lora.r, inputs), cut=cuts[0]),
        ParameterSpec(name=f"{path}.lora_B.{NAME}.weight", shape=(outputs, lora.r), cut=cuts[1]),
    )


def _frozen(parameter: ParameterSpec) -> ParameterSpec:
    return parameter.model_copy(update={"trainable": False})
