"""Everything that one task may choose, and what each choice costs.

Strategies of every unit as arrays of seconds and bytes, and what parts of them are spaces of their own.  Knows nothing
of how to choose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from galvatron.core.model import ENDS, UnitName
from galvatron.cost.memory import bytes_in_flight
from galvatron.cost.setting import Setting
from galvatron.cost.strategies import Floats, Ints, Strategies
from galvatron.plan.schedules import InFlight

from .geometry import Geometry
from .tasks import Task


@dataclass(frozen=True)
class Options:
    """The strategies of one unit as arrays: seconds a microbatch (``UnitTimes.work_s``), bytes, layout index."""

    strategies: Strategies
    work_s: Floats
    resident_bytes: Ints
    activation_bytes: Ints
    waiting_bytes: Ints
    transient_bytes: Ints
    layout: Ints

    def __len__(self) -> int:
        return len(self.work_s)

    def take(self, at: Ints) -> Options:
        """The options at indices ``at``, in that order."""
        return Options(
            self.strategies.take(at),
            self.work_s[at],
            self.resident_bytes[at],
            self.activation_bytes[at],
            self.waiting_bytes[at],
            self.transient_bytes[at],
            self.layout[at],
        )

    def free(self) -> Options:
        """The same strategies at no cost."""
        no_bytes = np.zeros(len(self), dtype=np.int64)
        return Options(self.strategies, np.zeros(len(self)), no_bytes, no_bytes, no_bytes, no_bytes, self.layout)

    def held_bytes(self, in_flight: InFlight) -> Ints:
        """What stays, with what microbatches in flight keep."""
        return self.resident_bytes + bytes_in_flight(in_flight, self.activation_bytes, self.waiting_bytes)

    @cached_property
    def index(self) -> dict[tuple[int, ...], int]:
        """The option of every strategy, by its fields."""
        return {row: i for i, row in enumerate(self.strategies.rows())}


@dataclass(frozen=True)
class Space:
    """All choices of one task, costed.

    ``moves_s[unit][a, b]``: what a microbatch's redistribution both ways into ``unit`` adds to the work, between
    layouts a and b, indices into ``layouts`` (sequence degrees); ``usable_bytes``: tensors that fit on a device;
    ``whole``: the space of which this one has a part of the options.
    """

    task: Task
    setting: Setting
    layouts: tuple[int, ...]
    options: Mapping[UnitName, Options]
    moves_s: Mapping[UnitName, Floats]
    usable_bytes: int
    whole: Space | None = None

    @property
    def is_joined(self) -> bool:
        """Whether stages hold parts of the embedding that run between stacks, by its strategy."""
        return self.task.pp > 1 and bool(self.setting.model.spec.joints)

    @cached_property
    def geometry(self) -> Geometry:
        """Of the whole space: what is left of the options makes no difference to it, but the embedding's if it is one.

        Where several may be the embedding's, what depends on which is left out: a space of more plans.
        """
        if self.is_joined and len(self.options["embedding"]) == 1:
            return self._stages.with_embedding(self.options["embedding"].strategies[0])
        return self._stages

    @cached_property
    def _stages(self) -> Geometry:
        return Geometry(self.setting) if self.whole is None else self.whole._stages

    @property
    def is_empty(self) -> bool:
        """Whether some unit has no strategy at all."""
        return not all(len(options) for options in self.options.values()) or self.end_pairs == ()

    @cached_property
    def end_pairs(self) -> tuple[tuple[int, int], ...] | None:
        """The (embedding, head) options of equal strategies, where ends have to be alike; None when any pair may be."""
        if not (self.setting.model.spec.ends_alike or self.setting.runtime == "hetu"):
            return None
        if self.whole is not None and all(self.options[end] is self.whole.options[end] for end in ENDS):
            return self.whole.end_pairs
        head = self.options["head"].index
        pairs = ((i, head.get(strategy)) for strategy, i in self.options["embedding"].index.items())
        return tuple((i, j) for i, j in pairs if j is not None)

    @cached_property
    def alternatives(self) -> tuple[Space, ...]:
        """Spaces that are this one together, in each of which, ends apart, any options go together.

        Hetu-Galvatron's plans have one kind of data parallelism beside ZeRO 3: none or ZeRO 2.
        """
        found = [self]
        if self.setting.runtime == "hetu":
            columns = {unit: options.strategies for unit, options in self.options.items()}
            without_2 = {unit: np.flatnonzero(s.zero != 2) for unit, s in columns.items()}
            with_2 = {unit: np.flatnonzero((s.zero > 0) | (s.dp * s.ulysses == 1)) for unit, s in columns.items()}
            found = [self.restricted(without_2), self.restricted(with_2)]
        return tuple(space for space in found if not space.is_empty)

    def without_bytes(self) -> Space:
        """This space where nothing holds anything; of options that take as long those that held less come first."""

        def alone(options: Options) -> Options:
            first = options.take(np.lexsort((options.resident_bytes + options.activation_bytes, options.work_s)))
            return replace(first.free(), work_s=first.work_s)

        return replace(self, options={unit: alone(options) for unit, options in self.options.items()}, whole=self)

    def with_free_ends(self) -> Space:
        """This space with an embedding and a head that take no time and hold nothing."""
        ends = {end: self.options[end].take(np.zeros(1, dtype=np.int64)).free() for end in ENDS}
        return replace(self, options={**self.options, **ends}, whole=self)

    def with_joined_ends(self, pairs: Sequence[tuple[int, int]]) -> Space:
        """This space where one stage holds both ends, which are ``pairs`` of one layout.

        Each pair is an embedding; the head takes nothing and is there for its layout.
        """
        first, last = np.array(pairs).T
        embedding, head = self.options["embedding"].take(first), self.options["head"].take(last)
        joined = Options(
            embedding.strategies,
            embedding.work_s + head.work_s,
            embedding.resident_bytes + head.resident_bytes,
            embedding.activation_bytes + head.activation_bytes,
            embedding.waiting_bytes + head.waiting_bytes,
            np.maximum(embedding.transient_bytes, head.transient_bytes),
            embedding.layout,
        )
        ends = {"embedding": joined, "head": head.take(np.zeros(1, dtype=np.int64)).free()}
        return replace(self, options={**self.options, **ends}, whole=self)

    @cached_property
    def layer_layouts(self) -> Ints:
        """The layouts that layers may have, ascending."""
        found: Ints = np.unique(np.concatenate([self.options[k.name].layout for k in self.setting.model.spec.layers]))
        return found

    @property
    def least_move_s(self) -> float:
        """What a change of layout among the layers adds to the work at least; infinite where they have but one."""
        at = self.layer_layouts
        moves = [self.moves_s[kind.name][np.ix_(at, at)] for kind in self.setting.model.spec.layers]
        return float(np.min([move[~np.eye(len(at), dtype=bool)].min(initial=math.inf) for move in moves]))

    def in_layout(self, layout: int) -> Space:
        """This space with only those options of the layers whose layout is ``layout``."""
        kinds = [kind.name for kind in self.setting.model.spec.layers]
        return self.restricted({kind: np.flatnonzero(self.options[kind].layout == layout) for kind in kinds})

    def restricted(self, chosen: Mapping[UnitName, Ints]) -> Space:
        """This space with only the ``chosen`` options of some units."""
        smaller = {name: options.take(chosen[name]) for name, options in self.options.items() if name in chosen}
        return replace(self, options={**self.options, **smaller}, whole=self)
