"""A family as data: every size of its parameters as a formula of its config's keys.

Takes a type's config; builds tiny models in two sizes, with each flag of the config set and unset, and finds formulas
that hold for all.  What is found is checked against the models themselves, so that a guess is never kept.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping

import transformers
from transformers import AutoConfig, PretrainedConfig

from galvatron.core.errors import ConfigError
from galvatron.core.family import Family, Outline
from galvatron.core.known import USUAL_LAYERS, USUAL_SIZES, KnownFamily, KnownStack, Shape, usual_sizes
from galvatron.core.model import LayerKind, ModelSpec, ParameterSpec

from .by_formula import (
    DEPTHS,
    PER_TOKEN,
    SEEN,
    WORDS_OF_FLAGS,
    defaults_in,
    find_formula,
    key_of,
    names_in,
    parts_of,
    sizes_in,
    two_sizes,
    used_keys,
    with_head_dim,
)
from .flags import flags_of
from .fold import folded, repeated, transposed_in
from .load import meta_model
from .recognise import recognise
from .spec import spec_of
from .staged import is_staged


def describe(config: PretrainedConfig, proved: Mapping[str, str]) -> KnownFamily:
    """The family of a type's default ``config``, which names its architecture, its shapes, and what was ``proved``.

    Of stages, whose sizes are lists, without shapes.

    Raises:
        ConfigError: it is no chain of layers, or some size follows from no formula.
    """
    if is_staged(config):
        return _without_shapes(recognise(config), proved)
    config = with_head_dim(config)
    family = _with_variants(config)
    twins = two_sizes(config)
    sizes = [sizes_in(twin) for twin in twins]
    flags, fixed = flags_of(config, family)
    settings = _settings(twins, family, flags)
    ends = [_conditional(settings, sizes, unit) for unit in ("embedding", "head")]
    layers = [_conditional(settings, sizes, "layer", stack) for stack in range(len(family.stacks))]
    specs = [spec_of(meta_model(twin), "x", family) for twin in twins]
    whole, counted = _model_sizes(specs, sizes), _layer_sizes(specs, twins, family, sizes)
    tower = specs[0].tower
    if tower is not None:
        ends[0] = repeated(ends[0], tower.layers, _depth_keys(twins[0], (tower.layers,))[0])
    used = used_keys([*ends, *layers], [whole, *counted, *([] if tower is None else [SEEN])])
    return KnownFamily(
        outline=Outline(**{name: getattr(family, name) for name in Outline.model_fields}),
        transformers=transformers.__version__,
        proved=dict(proved),
        names=names_in(config),
        defaults=defaults_in(config, family, used, flags),
        fixed=fixed | _types_of_parts(config),
        sizes=_unusual(whole, USUAL_SIZES),
        embedding=folded(ends[0]),
        stacks=tuple(
            KnownStack(
                **dict(stack),
                sizes=_unusual(own, usual_sizes(stack)),
                layer=folded(layer, transposed_in(specs[0], family, at)),
            )
            for at, (stack, own, layer) in enumerate(zip(family.stacks, counted, layers, strict=True))
        ),
        head=folded(ends[1]),
    )


def _without_shapes(family: Family, proved: Mapping[str, str]) -> KnownFamily:
    """A family whose sizes are lists."""
    return KnownFamily(
        outline=Outline(**{name: getattr(family, name) for name in Outline.model_fields}),
        transformers=transformers.__version__,
        proved=dict(proved),
        stacks=tuple(KnownStack(**dict(stack)) for stack in family.stacks),
    )


def _types_of_parts(config: PretrainedConfig) -> dict[str, str]:
    """Of configurations within one that may be of any type."""
    may_be = [name for name, kind in config.sub_configs.items() if kind is AutoConfig]
    return {f"{name}.model_type": getattr(config, name).model_type for name in may_be}


def _with_variants(config: PretrainedConfig) -> Family:
    """The family of ``config`` as it is found now, with the regions that layers have where a key's word is another."""
    family = recognise(config)
    for flag in WORDS_OF_FLAGS.keys() & config.to_dict().keys():
        other = recognise(_with(config, {flag: not getattr(config, flag)}))
        further = [
            tuple(r for r in b.regions if r not in a.regions) for a, b in zip(family.stacks, other.stacks, strict=True)
        ]
        stacks = (
            s.model_copy(update={"regions": s.regions + more}) for s, more in zip(family.stacks, further, strict=True)
        )
        family = family.model_copy(update={"stacks": tuple(stacks)})
    return family


Setting = tuple[dict[str, bool], list[ModelSpec]]
"""Values of flags, and the twins under them."""


def _settings(twins: tuple[PretrainedConfig, ...], family: Family, flags: Mapping[str, bool]) -> list[Setting]:
    """All values of ``flags``."""
    every = (dict(zip(flags, values, strict=True)) for values in itertools.product((False, True), repeat=len(flags)))
    return [(one, [spec_of(meta_model(_with(twin, one)), "x", family) for twin in twins]) for one in every]


def _conditional(settings: list[Setting], sizes: list[dict[str, int]], unit: str, stack: int = 0) -> tuple[Shape, ...]:
    """Every parameter of a unit (of a ``stack``'s layers) under any flags, in the order of the model with most."""
    found: dict[str, tuple[ParameterSpec, ...]] = {}
    order: list[str] = []
    lacking: dict[str, str] = {}
    alone: dict[str, str] = {}
    under: dict[str, list[dict[str, bool]]] = {}
    for setting, specs in settings:
        if unit == "layer":
            kinds = [_kinds_of_stack(spec, stack) for spec in specs]
            rows = [_all_parameters(own) for own in kinds]
            lacking |= _counts(map(_lacked_at_first, kinds), sizes)
            alone |= _counts(map(_at_first_alone, kinds), sizes)
        else:
            rows = [spec.unit(unit).parameters for spec in specs]
        for alike in zip(*rows, strict=True):
            found.setdefault(alike[0].name, alike)
            under.setdefault(alike[0].name, []).append(setting)
        _put_in_order(order, [p.name for p in rows[0]])
    shapes = (_shape(alike, sizes, _when(under[name], len(settings))) for name in order for alike in [found[name]])
    if unit == "embedding":
        return _with_ways(tuple(shapes), [specs[0] for _, specs in settings])
    return tuple(
        shape.model_copy(update={"after": lacking.get(shape.names[0], "0"), "until": alone.get(shape.names[0], "0")})
        for shape in shapes
    )


def _with_ways(shapes: tuple[Shape, ...], specs: list[ModelSpec]) -> tuple[Shape, ...]:
    """An embedding's parameters with the stacks on the way to which they are; the first is the vocabulary's table."""
    ways: dict[str, int] = {}
    again: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        ways |= {name: stack for stack, joint in enumerate(spec.joints, 1) for name in joint.parameters}
        tables = tuple(stack for stack, joint in enumerate(spec.joints, 1) if joint.table)
        again |= {p.name: tables for p in spec.embedding.parameters[:1]}
    return tuple(
        shape.model_copy(update={"stack": ways.get(shape.names[0], 0), "again": again.get(shape.names[0], ())})
        for shape in shapes
    )


def _put_in_order(order: list[str], names: list[str]) -> None:
    """Put those of ``names`` that ``order`` lacks where they come among the others."""
    for before, name in zip([None, *names], names, strict=False):
        if name not in order:
            order.insert(0 if before is None else order.index(before) + 1, name)


def _depths(twin: PretrainedConfig, paths: tuple[str, ...]) -> list[int]:
    """How many layers each of these lists of a model has."""
    model = meta_model(twin)
    return [len(list(model.get_submodule(path).children())) for path in paths]


def _kinds_of_stack(spec: ModelSpec, stack: int) -> list[LayerKind]:
    """The kinds of a stack's layers that run, in order."""
    layers = spec.stack_ranges[stack]
    return [kind for kind in dict.fromkeys(spec.kind_of_layers()[layers.start : layers.stop]) if not kind.idle]


def _all_parameters(kinds: list[LayerKind]) -> tuple[ParameterSpec, ...]:
    """Those of every kind, in the order of the kinds that have them."""
    order: list[str] = []
    for kind in kinds:
        _put_in_order(order, [p.name for p in kind.parameters])
    found = {p.name: p for kind in kinds for p in kind.parameters}
    return tuple(found[name] for name in order)


def _counts(found: Iterable[dict[str, int]], sizes: list[dict[str, int]]) -> dict[str, str]:
    """Formulas of what was ``found`` of each twin."""
    rows = list(found)
    return {name: find_formula(tuple(row[name] for row in rows), sizes) for name in rows[0]}


def _at_first_alone(kinds: list[LayerKind]) -> dict[str, int]:
    """Parameters that the first layers of a stack alone have, and how many layers they are."""
    first, *_, last = (*kinds, kinds[-1])
    return {p.name: first.count for p in first.parameters if p not in last.parameters}


def _lacked_at_first(kinds: list[LayerKind]) -> dict[str, int]:
    """Parameters that the first layers of a stack lack, and how many layers they are; all others have the same."""
    *others, last = kinds
    lacking = {p.name: kind.count for kind in others[:1] for p in last.parameters if p not in kind.parameters}
    if len(others) > 1:
        raise ConfigError("layers are of several kinds in no simple way; keep the type out of the data")
    return lacking


def _with(twin: PretrainedConfig, flags: Mapping[str, bool]) -> PretrainedConfig:
    changed = copy.deepcopy(twin)
    for name, flag in flags.items():
        setattr(changed, name, flag)
    return changed


def _when(settings: list[dict[str, bool]], every: int) -> dict[str, bool]:
    """The flags that all ``settings`` share, if these alone decide."""
    shared = {n: v for n, v in settings[0].items() if all(setting[n] == v for setting in settings)}
    if len(settings) * 2 ** len(shared) != every:
        raise ConfigError("a parameter depends on flags in no simple way; keep the type out of the data")
    return shared


def _shape(alike: tuple[ParameterSpec, ...], sizes: list[dict[str, int]], when: dict[str, bool]) -> Shape:
    first = alike[0]
    shape = tuple(find_formula(dims, sizes) for dims in zip(*(p.shape for p in alike), strict=True))
    words = first.cut is not None and first.cut.uneven == "ceil"
    return Shape(
        names=(first.name,), shape=shape, words=words, shared=first.shared, trainable=first.trainable, when=when
    )


def _unusual(formulas: dict[str, str], usual: dict[str, str]) -> dict[str, str]:
    return {name: formula for name, formula in formulas.items() if usual.get(name) != formula}


def _model_sizes(specs: list[ModelSpec], sizes: list[dict[str, int]]) -> dict[str, str]:
    """Formulas of the sizes that a model has once."""
    return {name: _formula(name, tuple(getattr(spec, name) for spec in specs), sizes) for name in USUAL_SIZES}


def _formula(name: str, values: tuple[int, ...], sizes: list[dict[str, int]]) -> str:
    """The usual formula of a size, if it holds."""
    usual = (USUAL_SIZES | USUAL_LAYERS).get(name)
    return usual if usual and values == tuple(size.get(usual) for size in sizes) else find_formula(values, sizes)


def _layer_sizes(
    specs: list[ModelSpec], twins: tuple[PretrainedConfig, ...], family: Family, sizes: list[dict[str, int]]
) -> list[dict[str, str]]:
    """Formulas of every stack's sizes."""
    found: list[dict[str, str]] = []
    for stack, key in enumerate(_depth_keys(twins[0], tuple(stack.path for stack in family.stacks))):
        kinds = [_kinds_of_stack(spec, stack) for spec in specs]
        lasts = [own[-1] for own in kinds]
        names = ["hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim"]
        names += [name for name in ("fixed_tokens", "carried", "num_experts") if getattr(lasts[0], name)]
        own = {name: _formula(name, tuple(getattr(kind, name) for kind in lasts), sizes) for name in names}
        if lasts[0].num_experts:
            own["experts_per_token"] = PER_TOKEN
            if not kinds[0][0].num_experts:
                own["dense_ffn_size"] = find_formula(tuple(first.ffn_size for first, *_ in kinds), sizes)
        found.append({"num_layers": key, **own})
    return found


def _depth_keys(twin: PretrainedConfig, paths: tuple[str, ...]) -> list[str]:
    """Which key counts the layers of the list at each of ``paths``: that whose change it follows."""
    before, found = _depths(twin, paths), [""] * len(paths)
    for prefix, part in parts_of(twin):
        for name in DEPTHS:
            if (key := key_of(part, name)) and isinstance(usual := getattr(part, key), int):
                setattr(part, key, usual - 1)  # lists of kinds of layers are no longer
                after = _depths(twin, paths)
                setattr(part, key, usual)
                found = [
                    f"{prefix}{name}" if b != a else known for known, b, a in zip(found, before, after, strict=True)
                ]
    if "" in found:
        raise ConfigError("no key of the config counts the layers of a stack; keep the type out of the data")
    return found
