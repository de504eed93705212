"""ModelSpec of a family that ships as data: its formulas at a configuration's numbers."""

from __future__ import annotations

from galvatron.core.errors import ConfigError
from galvatron.core.family import BEYOND_RINGS, KnownFamily, Shape, known_families
from galvatron.core.formulas import value
from galvatron.core.lora import Lora, with_adapters
from galvatron.core.model import Cut, LayerKind, ModelSpec, ParameterSpec, UnitSpec
from galvatron.core.numbers import MAX_TOKENS
from galvatron.core.words import shown

from .parts import Config


def spec_of_known(known: KnownFamily, config: Config, name: str) -> ModelSpec:
    """The model of ``config``, called ``name``; raises ConfigError where a size is missing or no size."""
    reader = _Reader(known, config)
    reader.check_fixed()
    counts = {key: reader.size(known.sizes[key]) for key in known.sizes}
    longest = counts.pop("max_seq_len", MAX_TOKENS)
    layers, words = counts.pop("num_layers"), counts.pop("vocab_size")
    return ModelSpec(
        name=name,
        family=known.family.model_type,
        task=known.family.task,
        ends=known.family.ends,
        stacks=len(known.family.stacks),
        layers=(
            LayerKind(
                count=layers,
                asks_for_attention=known.family.asks_for_attention,
                cuttable=known.family.is_cuttable,
                drops_attention=any(map(reader.rate, BEYOND_RINGS)),
                parameters=reader.unit(known.layer),
                **counts,
            ),
        ),
        vocab_size=words,
        max_seq_len=longest,
        tied_embeddings=reader.flag("tie_word_embeddings"),
        embedding=UnitSpec(parameters=reader.unit(known.embedding)),
        head=UnitSpec(parameters=reader.unit(known.head)),
    )


def adapted_spec(spec: ModelSpec, lora: Lora) -> ModelSpec:
    """``spec``, frozen, with LoRA adapters; raises ConfigError where it is not known on which linears."""
    known = known_families().get(spec.family)
    if known is None:
        raise ConfigError(
            f"it is not known which linears of {spec.name} ({spec.family}) can have adapters; profile the model "
            "instead, which reads its code"
        )
    return with_adapters(spec, known.family, lora)


class _Reader:
    """A configuration read by the names of its family's formulas."""

    def __init__(self, known: KnownFamily, config: Config) -> None:
        self._known, self._config = known, config

    def size(self, formula: str) -> int:
        """The value of a formula."""
        return value(formula, self._named)

    def flag(self, name: str) -> bool:
        """A flag, or its default."""
        return self._config.get(name, bool(self._known.defaults.get(name, False)))

    def rate(self, name: str) -> float:
        """A number that may be zero or missing."""
        value = self._config.raw(name)
        return float(self._known.defaults.get(name, 0.0) if value is None else value)

    def unit(self, shapes: tuple[Shape, ...]) -> tuple[ParameterSpec, ...]:
        """The parameters that exist under the configuration's flags."""
        return tuple(self._parameter(s) for s in shapes if all(self.flag(f) == v for f, v in s.when.items()))

    def check_fixed(self) -> None:
        """Raise ConfigError where a flag is another than the one that the shapes hold for."""
        for name, usual in self._known.fixed.items():
            if (given := self._config.get(name, usual)) != usual:
                raise ConfigError(
                    f"{name}={shown(given)} of a {self._known.family.model_type} config has no shapes here; "
                    "profile the model instead, which reads its code"
                )

    def _named(self, name: str) -> int:
        key, default = self._known.names.get(name, name), self._known.defaults.get(name)
        if key in self._config or default is None:
            return self._config.size(key)
        if isinstance(default, str) and "/" in default:
            whole, parts = (self._known.names.get(part, part) for part in default.split("/"))
            size, count = self._config.heads(whole, parts)
            return size // count
        return self.size(default) if isinstance(default, str) else int(default)

    def _parameter(self, shape: Shape) -> ParameterSpec:
        cut = None
        if shape.dim is not None:
            cut = Cut(dim=shape.dim, segments=tuple(map(self.size, shape.segments)), uneven=shape.uneven)
        return ParameterSpec(name=shape.name, shape=tuple(map(self.size, shape.shape)), cut=cut, experts=shape.experts)
