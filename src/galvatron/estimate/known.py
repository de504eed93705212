"""ModelSpec of a family that ships as data: its formulas at a configuration's numbers."""

from __future__ import annotations

from collections.abc import Iterator

from galvatron.core.errors import ConfigError
from galvatron.core.family import BEYOND_RINGS, WINDOWS, KnownFamily, Shape, known_family
from galvatron.core.formulas import num_patches, value
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
    family = known.family
    causal = family.stacks[0].causal
    return ModelSpec(
        name=name,
        family=family.model_type,
        task=family.task,
        ends=family.ends,
        stacks=len(family.stacks),
        layers=tuple(
            LayerKind(
                name=kind,
                count=count,
                asks_for_attention=family.asks_for_attention,
                cuttable=family.is_cuttable,
                causal=causal,
                drops_attention=any(map(reader.rate, BEYOND_RINGS if causal else (*BEYOND_RINGS, *WINDOWS))),
                parameters=parameters,
                **counts,
            )
            for kind, count, parameters in _kinds(reader, known.layer, layers)
        ),
        vocab_size=words,
        max_seq_len=longest,
        tied_embeddings=family.embedding is not None and family.head is not None and reader.flag("tie_word_embeddings"),
        embedding=UnitSpec(parameters=reader.unit(known.embedding)),
        head=UnitSpec(parameters=reader.unit(known.head)),
    )


def _kinds(
    reader: _Reader, shapes: tuple[Shape, ...], layers: int
) -> Iterator[tuple[str, int, tuple[ParameterSpec, ...]]]:
    """(name, count, parameters) of every run of layers that have the same."""
    first = min(max(shape.after for shape in shapes), layers)
    runs = [range(first), range(first, layers)]
    had = [reader.unit(tuple(s for s in shapes if s.after <= run.start)) for run in runs]
    if not first or first == layers or had[0] == had[1]:
        yield "layer", layers, had[1 if first < layers else 0]
        return
    for run, parameters in zip(runs, had, strict=True):
        yield f"layers {run.start}-{run.stop - 1}", len(run), parameters


def adapted_spec(spec: ModelSpec, lora: Lora) -> ModelSpec:
    """``spec``, frozen, with LoRA adapters; raises ConfigError where it is not known on which linears."""
    known = known_family(spec.family, spec.task)
    if known is None:
        raise ConfigError(
            f"it is not known which linears of {spec.name} ({spec.family}) can have adapters; profile the model "
            "instead, which reads its code"
        )
    return with_adapters(spec, known.family, lora)


MADE = ("num_labels", "num_patches", "num_positions")
"""Names in formulas that are no keys of a config."""


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
        if name in MADE:
            return self._made(name)
        key, default = self._known.names.get(name, name), self._known.defaults.get(name)
        if key in self._config or default is None:
            return self._config.size(key)
        if isinstance(default, str) and "/" in default:
            whole, parts = (self._known.names.get(part, part) for part in default.split("/"))
            size, count = self._config.heads(whole, parts)
            return size // count
        return self.size(default) if isinstance(default, str) else int(default)

    def _made(self, name: str) -> int:
        """A size that no key has by itself."""
        if name == "num_labels":
            return self._config.num_labels()
        if name == "num_patches":
            keys = ("image_size", "patch_size")
            image, patch = (self._config.sides(key, self._known.defaults.get(key)) for key in keys)
            if any(part > side for side, part in zip(image, patch, strict=True)):
                raise ConfigError(
                    f"patch_size={patch[0]} must not exceed image_size={image[0]}; give a Hugging Face config.json"
                )
            return num_patches(image, patch)
        return self._named("max_position_embeddings") - int(self.rate("pad_token_id")) - 1

    def _parameter(self, shape: Shape) -> ParameterSpec:
        cut = None
        if shape.dim is not None:
            cut = Cut(dim=shape.dim, segments=tuple(map(self.size, shape.segments)), uneven=shape.uneven)
        return ParameterSpec(name=shape.name, shape=tuple(map(self.size, shape.shape)), cut=cut, experts=shape.experts)
