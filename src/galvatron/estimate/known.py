"""ModelSpec of a family that ships as data: its formulas at a configuration's numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from galvatron.core.cuts import are_experts, layer_cuts
from galvatron.core.errors import ConfigError
from galvatron.core.family import BEYOND_RINGS, DROPS, WINDOWS, Blocks, Family, Stack, beside_experts
from galvatron.core.formulas import num_patches, value
from galvatron.core.known import (
    USUAL_DEFAULTS,
    USUAL_SIZES,
    KnownFamily,
    Shape,
    known_family,
)
from galvatron.core.lora import Lora, with_adapters
from galvatron.core.model import Cut, Joint, LayerKind, ModelSpec, ParameterSpec, UnitSpec
from galvatron.core.numbers import MAX_LAYERS, MAX_TOKENS
from galvatron.core.words import shown

from .parts import Config
from .vision import tower_of


def spec_of_known(known: KnownFamily, config: Config, name: str) -> ModelSpec:
    """The model of ``config``, called ``name``; raises ConfigError where a size is missing or no size."""
    reader = _Reader(known, config)
    reader.check_fixed()
    depths = {shape.each for shape in known.embedding} | {stack.formulas["num_layers"] for stack in known.stacks}
    for depth in sorted(filter(None, depths)):
        reader.check_most(depth, MAX_LAYERS)
    reader.check_most((USUAL_SIZES | known.sizes)["max_seq_len"], MAX_TOKENS)
    whole = reader.sizes(USUAL_SIZES | known.sizes)
    every = [reader.sizes(stack.formulas) for stack in known.stacks]
    counts = [sizes.pop("num_layers") for sizes in every]
    family = known.family
    return ModelSpec(
        name=name,
        family=family.model_type,
        task=family.task,
        ends=family.ends,
        stacks=len(family.stacks),
        joints=tuple(_joint(reader, known, stack, sum(counts[:stack])) for stack in range(1, len(family.stacks))),
        layers=tuple(
            LayerKind(
                name="layer" if len(run) == sum(counts) else f"layers {run.start}-{run.stop - 1}",
                count=len(run),
                asks_for_attention=family.asks_for_attention,
                cuttable=family.is_cuttable,
                idle=idle,
                needs_output=stack.needs_output or any(map(reader.rate, DROPS)),
                causal=stack.causal,
                drops_attention=_is_beyond_rings(reader, family, stack),
                side_inputs=int(stack.side is not None and "carried" not in every[at]),
                regions=2 + int(stack.side is not None),
                beside_experts=beside_experts(stack, parameters),
                parameters=parameters,
                **_sizes_of_run(every[at], parameters),
            )
            for at, stack in enumerate(family.stacks)
            for run, parameters, idle in _runs(reader, known, at, every[at], counts)
        ),
        vocab_size=whole["vocab_size"],
        max_seq_len=whole["max_seq_len"],
        tied_embeddings=family.embedding is not None and family.head is not None and reader.flag("tie_word_embeddings"),
        embedding=UnitSpec(parameters=reader.unit(known.embedding)),
        head=UnitSpec(parameters=reader.unit(known.head)),
        tower=None if known.outline.tower is None else tower_of(reader, known),
    )


def _joint(reader: _Reader, known: KnownFamily, stack: int, layer: int) -> Joint:
    """The way to ``stack``, whose first layer is ``layer``."""
    own = tuple(shape for shape in known.embedding if shape.stack == stack)
    table = any(stack in shape.again for shape in known.embedding)
    return Joint(layer=layer, parameters=tuple(p.name for p in reader.unit(own)), table=table)


def _is_beyond_rings(reader: _Reader, family: Family, stack: Stack) -> bool:
    """Whether attention is dropped or capped, or a window looks both ways; or stacks see each other."""
    names = BEYOND_RINGS if stack.causal else (*BEYOND_RINGS, *WINDOWS)
    return len(family.stacks) > 1 or any(map(reader.rate, names))


def _runs(
    reader: _Reader, known: KnownFamily, at: int, sizes: dict[str, int], counts: list[int]
) -> Iterator[tuple[range, tuple[ParameterSpec, ...], bool]]:
    """(which layers, parameters, whether they are idle) of every run of layers of stack ``at`` that have the same.

    ``counts``: the layers of every stack.
    """
    shapes, layers, start = known.stacks[at].layer, counts[at], sum(counts[:at])
    first = min(max(max(map(reader.count, (shape.after, shape.until))) for shape in shapes), layers)
    runs = [run for run in (range(first), range(first, layers)) if run]
    had = [
        _cut(known.stacks[at], sizes, tuple(s for s in shapes if _has(reader, s, run.start)), reader) for run in runs
    ]
    if len(set(had)) == 1:
        runs = [range(layers)]
    own = known.stacks[at]
    used = layers - own.idle_layers(reader.rate(own.taken_at) if own.taken_at else None, layers)
    for run, parameters in zip(runs, had, strict=False):
        frozen = tuple(p.model_copy(update={"trainable": False}) for p in parameters)
        for first, stop, idle in ((run.start, min(run.stop, used), False), (max(run.start, used), run.stop, True)):
            if first < stop:
                yield range(start + first, start + stop), frozen if idle else parameters, idle


def _cut(stack: Stack, sizes: dict[str, int], shapes: tuple[Shape, ...], reader: _Reader) -> tuple[ParameterSpec, ...]:
    """The parameters of layers of ``shapes`` with their cuts."""
    whole = reader.unit(shapes)
    counts: dict[Blocks, int] = {"heads": sizes["num_heads"], "kv_heads": sizes["num_kv_heads"]}
    transposed = {name for shape in shapes if shape.transposed for name in shape.names}
    cuts = layer_cuts(stack, {p.name: p.shape for p in whole}, counts, transposed)
    return tuple(p.model_copy(update={"cut": cuts.get(p.name), "experts": are_experts(p.name, p.shape)}) for p in whole)


def _sizes_of_run(sizes: dict[str, int], parameters: tuple[ParameterSpec, ...]) -> dict[str, int]:
    """A stack's ``sizes`` as layers with ``parameters`` have them: without experts their MLP is another."""
    own = {name: size for name, size in sizes.items() if name != "dense_ffn_size"}
    if "dense_ffn_size" not in sizes or any(p.experts for p in parameters):
        return own
    return own | {"ffn_size": sizes["dense_ffn_size"], "num_experts": 0, "experts_per_token": 0}


def _has(reader: _Reader, shape: Shape, layer: int) -> bool:
    """Whether layer ``layer`` of its stack has a parameter of ``shape``."""
    return reader.count(shape.after) <= layer and (shape.until == "0" or layer < reader.count(shape.until))


def adapted_spec(spec: ModelSpec, lora: Lora) -> ModelSpec:
    """``spec``, frozen, with LoRA adapters; raises ConfigError where it is not known on which linears."""
    known = known_family(spec.family, spec.task)
    if known is None:
        raise ConfigError(
            f"it is not known which linears of {spec.name} ({spec.family}) can have adapters; profile the model "
            "instead, which reads its code"
        )
    return with_adapters(spec, known.family, lora)


MADE = ("num_labels", "num_patches", "num_positions", "latent_head_dim")
"""Names in formulas that are no keys of a config."""


TEXT = "text_config"


class _Reader:
    """A configuration read by the names of its family's formulas."""

    def __init__(self, known: KnownFamily, config: Config) -> None:
        self._known, self._config = known, config
        self._defaults = {name: usual for name, usual in known.defaults.items() if not isinstance(usual, list)}

    def size(self, formula: str) -> int:
        """The value of a formula."""
        return value(formula, self._named)

    def sizes(self, formulas: dict[str, str]) -> dict[str, int]:
        """The values of several."""
        return {name: self.size(formula) for name, formula in formulas.items()}

    def count(self, formula: str) -> int:
        """The value of one whose numbers may be 0."""
        return value(formula, self._whole)

    def flag(self, name: str) -> bool:
        """A flag, or its default."""
        config, key = self._part(name)
        default = self._defaults.get(name, self._known.fixed.get(name, False))
        if isinstance(default, str):
            word, _, begins = default.partition("^")
            default = config.get(word, "").startswith(begins)
        return config.get(key, bool(default))

    def rate(self, name: str) -> float:
        """A number that may be zero or missing."""
        config, key = self._part(name)
        value = config.raw(key)
        return float(self._defaults.get(name, 0.0) if value is None else value)

    def given(self, name: str) -> object:
        """What a file has of any kind, or the default."""
        config, key = self._part(name)
        return config.given(key) if key in config else self._known.defaults.get(name)

    def key(self, name: str) -> str:
        """What the file calls ``name``, with the part that it is in."""
        part, dot, _ = name.rpartition(".")
        return f"{part}{dot}{self._part(name)[1]}"

    def check_most(self, formula: str, most: int) -> None:
        """Raise ConfigError where a formula that is a key has more than ``most``."""
        if (size := self.size(formula)) > most:
            raise ConfigError(
                f"{self.key(formula)}={size} of a {self._known.family.model_type} config must be at most {most}; "
                "give a Hugging Face config.json"
            )

    def unit(self, shapes: tuple[Shape, ...]) -> tuple[ParameterSpec, ...]:
        """The parameters that exist under the configuration's flags."""
        exist = (shape for shape in shapes if all(self.flag(name) == wanted for name, wanted in shape.when.items()))
        found: list[ParameterSpec] = []
        for each, beside in itertools.groupby(exist, lambda shape: shape.each):
            one = [parameter for shape in beside for parameter in self._parameters(shape)]
            numbers = map(str, range(self.size(each) if each else 1))
            found += [p.model_copy(update={"name": p.name.replace("*", n)}) for n in numbers for p in one]
        return tuple(found)

    def check_fixed(self) -> None:
        """Raise ConfigError where a flag is another than the one that the shapes hold for."""
        for name, usual in self._known.fixed.items():
            config, key = self._part(name)
            given = self.flag(name) if isinstance(usual, bool) else config.get(key, usual)
            if given != usual:
                raise ConfigError(
                    f"{name}={shown(given)} of a {self._known.family.model_type} config has no shapes here; "
                    "profile the model instead, which reads its code"
                )

    def _part(self, name: str) -> tuple[Config, str]:
        """The configuration that has ``name``, and how it calls it: as its type does, or as most types do."""
        part, _, own = name.rpartition(".")
        is_flat = part == TEXT and part not in self._config and own != "model_type"  # as older files of two parts are
        config = self._config.part(part) if part and not is_flat else self._config
        key = self._known.names.get(name, own)
        return config, own if own in config and key not in config else key

    def _whole(self, name: str) -> int:
        config, key = self._part(name)
        return config.whole(key) if key in config else int(self._defaults[name])

    def _named(self, name: str) -> int:
        if name.rpartition(".")[2] in MADE:
            return self._made(name)
        (config, key), default = self._part(name), self._default(name)
        if key in config or default is None:
            return config.size(key)
        if isinstance(default, str) and "/" in default:
            size, count = map(self._named, default.split("/"))
            if size % count:
                (_, whole), (_, parts) = (self._part(part) for part in default.split("/"))
                config.heads(whole, parts)  # which says so
            return size // count
        return self.size(default) if isinstance(default, str) else int(default)

    def _default(self, name: str) -> bool | int | float | str | None:
        """What the type takes where a file says nothing."""
        prefix, own = name[: name.rfind(".") + 1], name.rpartition(".")[2]
        usual = USUAL_DEFAULTS.get(own)
        return self._defaults.get(name, usual and "/".join(f"{prefix}{part}" for part in usual.split("/")))

    def _made(self, name: str) -> int:
        """A size that no key has by itself."""
        prefix, own = name[: name.rfind(".") + 1], name.rpartition(".")[2]
        if own == "num_labels":
            return self._config.num_labels()
        if own == "num_patches":
            names = (f"{prefix}image_size", f"{prefix}patch_size")
            config, defaults = self._part(names[0])[0], (self._defaults.get(key) for key in names)
            image, patch = (
                config.sides(key, default) for key, default in zip(("image_size", "patch_size"), defaults, strict=True)
            )
            if any(part > side for side, part in zip(image, patch, strict=True)):
                raise ConfigError(
                    f"patch_size={patch[0]} must not exceed image_size={image[0]}; give a Hugging Face config.json"
                )
            return num_patches(image, patch)
        if own == "latent_head_dim":
            return (self._named(f"{prefix}qk_head_dim") + self._named(f"{prefix}v_head_dim")) // 2
        return self._named("max_position_embeddings") - int(self.rate("pad_token_id")) - 1

    def _parameters(self, shape: Shape) -> Iterator[ParameterSpec]:
        """Uncut, but for words."""
        sizes = tuple(map(self.size, shape.shape))
        weight = ".weight" if shape.bias else ""
        has_bias = self.flag(shape.bias) if isinstance(shape.bias, str) else shape.bias
        for name in shape.names:
            cut = Cut(dim=0, segments=(sizes[0],), uneven="ceil") if shape.words else None
            yield ParameterSpec(
                name=name + weight, shape=sizes, cut=cut, shared=shape.shared, trainable=shape.trainable
            )
            if has_bias:
                outputs = sizes[-1 if shape.transposed else 0]
                yield ParameterSpec(name=f"{name}.bias", shape=(outputs,), trainable=shape.trainable)
