"""The parameters that families are made of: linears with their tensor-parallel cuts, norms, vocabularies.

Takes names and sizes; gives ParameterSpec.  Knows nothing of families.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

from galvatron.core.errors import ConfigError
from galvatron.core.model import Cut, LayerKind, ParameterSpec
from galvatron.core.words import shown

T = TypeVar("T")
WANTED = {bool: "true or false", float: "a positive number", str: "a word", list: "a list", dict: "an object"}
MAX_SIZE = 2**31 - 1  # of core.numbers.Count


class Config:
    """A configuration's keys with its family's defaults, as the model library fills them in."""

    def __init__(self, data: Mapping[str, Any], **defaults: Any) -> None:
        self._data = {**defaults, **{key: value for key, value in data.items() if value is not None}}

    def size(self, key: str) -> int:
        """A positive integer; ConfigError if it is missing or none."""
        value = self._data.get(key)
        if not _is_size(value):
            raise self._refuse(key, "a positive integer")
        assert isinstance(value, int)
        return value

    def sizes(self, key: str) -> tuple[int, ...]:
        """A list of positive integers; ConfigError if it is missing or none."""
        value = self._data.get(key)
        if not isinstance(value, (list, tuple)) or not value or not all(map(_is_size, value)):
            raise self._refuse(key, "a list of positive integers")
        return tuple(value)

    def sides(self, key: str, default: object) -> tuple[int, int]:
        """Both sides of what is square unless the key has a list of two; ConfigError if they are none."""
        value = self._data.get(key, default)
        given = (value, value) if _is_size(value) else value
        if not isinstance(given, (list, tuple)) or len(given) != 2 or not all(map(_is_size, given)):
            raise self._refuse(key, "a positive integer, or two")
        return given[0], given[1]

    def num_labels(self) -> int:
        """How many classes the configuration names, or counts, or the library takes."""
        names: dict[str, str] = self.get("id2label", {})
        return len(names) or self.get("num_labels", 2)

    def heads(self, hidden_key: str, heads_key: str) -> tuple[int, int]:
        """The two sizes, of which the second divides the first: every head has the same width."""
        hidden, heads = self.size(hidden_key), self.size(heads_key)
        if hidden % heads:
            raise self._refuse(heads_key, f"a divisor of {hidden_key}={hidden}")
        return hidden, heads

    def get(self, key: str, default: T) -> T:
        """The value of a key that may be missing, of its default's type; sizes are positive."""
        if key not in self:
            return default
        value, kind = self._data[key], type(default)
        if kind is int:
            return cast(T, self.size(key))
        if kind is float and not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value <= MAX_SIZE:
            return cast(T, float(value))
        if kind is float or not isinstance(value, kind):
            raise self._refuse(key, WANTED[kind])
        return value

    def part(self, key: str) -> Config:
        """A configuration within this one, which may be missing."""
        own: dict[str, Any] = self.get(key, {})
        return Config(own)

    def whole(self, key: str) -> int:
        """A whole number, which may be 0."""
        if self._data.get(key) == 0 and not isinstance(self._data[key], bool):
            return 0
        return self.size(key)

    def given(self, key: str) -> object:
        """The value of a key as it is; None if it is missing."""
        return self._data.get(key)

    def raw(self, key: str) -> float | None:
        """A number of any sign; None if it is missing, or null."""
        value = self._data.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise self._refuse(key, "a number")
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def _refuse(self, key: str, wanted: str) -> ConfigError:
        kind = self._data.get("model_type", "nested")
        return ConfigError(
            f"{key} of a {kind} config must be {wanted}, got {shown(self._data.get(key))}; "
            "give a Hugging Face config.json"
        )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIZE


def column(
    name: str, outputs: int, inputs: int, cut: Cut | None, bias: bool = False, transposed: bool = False
) -> Iterator[ParameterSpec]:
    """A linear cut along its outputs, its bias with it; weights are [outputs, inputs] unless ``transposed``."""
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    weight_cut = cut.model_copy(update={"dim": 1}) if cut is not None and transposed else cut
    yield ParameterSpec(name=f"{name}.weight", shape=shape, cut=weight_cut)
    if bias:
        yield ParameterSpec(name=f"{name}.bias", shape=(outputs,), cut=cut)


def row(
    name: str, outputs: int, inputs: int, blocks: int, bias: bool = False, transposed: bool = False
) -> Iterator[ParameterSpec]:
    """A linear cut along its inputs; every rank adds its bias whole."""
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    yield ParameterSpec(name=f"{name}.weight", shape=shape, cut=Cut(dim=0 if transposed else 1, segments=(blocks,)))
    if bias:
        yield whole(f"{name}.bias", outputs)


def whole(name: str, *shape: int) -> ParameterSpec:
    """A parameter that every tensor-parallel rank keeps."""
    return ParameterSpec(name=name, shape=shape)


def layer_norm(name: str, size: int) -> tuple[ParameterSpec, ParameterSpec]:
    """Weight and bias."""
    return whole(f"{name}.weight", size), whole(f"{name}.bias", size)


def vocabulary(name: str, *shape: int) -> ParameterSpec:
    """A parameter whose first dim counts words or classes; tensor-parallel ranks may hold one block fewer."""
    return ParameterSpec(name=name, shape=shape, cut=Cut(dim=0, segments=(shape[0],), uneven="ceil"))


def attention(
    prefix: str,
    names: tuple[str, str, str, str],
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bias: bool = False,
    output_bias: bool | None = None,
) -> Iterator[ParameterSpec]:
    """Query, key, value and output linears, cut by heads; kv heads fewer than the ranks stay whole."""
    query, key, value, output = names
    kv_cut = Cut(dim=0, segments=(kv_heads,), uneven="whole")
    yield from column(f"{prefix}{query}", heads * head_dim, hidden, Cut(dim=0, segments=(heads,)), bias)
    yield from column(f"{prefix}{key}", kv_heads * head_dim, hidden, kv_cut, bias)
    yield from column(f"{prefix}{value}", kv_heads * head_dim, hidden, kv_cut, bias)
    yield from row(f"{prefix}{output}", hidden, heads * head_dim, heads, bias if output_bias is None else output_bias)


def chain(*groups: Iterable[ParameterSpec]) -> tuple[ParameterSpec, ...]:
    """All of them, in order."""
    return tuple(parameter for group in groups for parameter in group)


def multi_head(
    count: int,
    hidden: int,
    ffn: int,
    heads: int,
    parameters: tuple[ParameterSpec, ...],
    name: str = "layer",
    causal: bool = True,
) -> LayerKind:
    """Layers in which every head has keys and values of its own."""
    return LayerKind(
        name=name,
        count=count,
        hidden_size=hidden,
        ffn_size=ffn,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        causal=causal,
        parameters=parameters,
    )
