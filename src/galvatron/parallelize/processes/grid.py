"""A plan laid over a world: this rank's stage, its place there, and the groups of axis products.

All groups that any layer of the plan needs are made up front, in one order on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from galvatron.plan import Copies, LayerStrategy, Plan
from galvatron.plan.filling import Filling

from .collectives import ALONE, AxisGroup
from .rows import ExpertGroups
from .world import World


@dataclass(frozen=True)
class Neighbour:
    """The rank with this one's place in the stage before or after, and the groups of the messages between them."""

    rank: int
    forward: dist.ProcessGroup
    backward: dist.ProcessGroup


class Grid:
    """Where this rank stands in a plan, and whom it talks to."""

    def __init__(self, plan: Plan, world: World, *, copied: Copies | None = None, folded: bool = False) -> None:
        """Make every process group of ``plan``; collective over the world.

        ``copied``: what several stages hold.  ``folded``: sequences are cut from both ends (``plan.axes``).
        """
        self.copied = copied or {}
        self.plan, self.world, self.axes, self.folded = plan, world, plan.axes, folded
        self.stage, self.stage_rank = divmod(world.rank, plan.stage_size)
        self._meshes: dict[tuple[int, int, int], DeviceMesh] = {}
        for inner, outer in sorted(_group_shapes(plan)):
            world.group(self._ranks(inner, outer))
        for strategy in sorted(set(plan.strategies()), key=str):
            self.ulysses(strategy)
            self.ring(strategy)
            self.experts(strategy)
            for layout in (strategy, strategy.of_experts):
                if layout.zero:
                    self.mesh(layout)
                else:
                    self.replicas(layout)
        column, ends = self.column, (self.column[0], self.column[-1])
        is_end = plan.pp > 1 and world.rank in ends
        self.before, self.after = self._neighbours(column, "")
        if is_end and plan.model_chunks > 1:
            # the last stage hands on to the first one's next chunk: with two stages they are neighbours twice
            around = self._neighbours((ends[1], ends[0]), " again")
            self.before, self.after = self.before or around[0], self.after or around[1]
        for stages in sorted(set(self.copied.values())):
            if self.stage in stages:
                self.group_of_copies(stages)
        if any(layer is not None for layer, _ in self.copied):
            for strategy in sorted(set(plan.strategies()), key=str):
                self.replicas(strategy.replicated)

    def _neighbours(self, column: tuple[int, ...], which: str) -> tuple[Neighbour | None, Neighbour | None]:
        """Those before and after this rank in ``column``.

        A group a pair and direction: NCCL serves what goes through one group in turn, so that no message queues behind
        one of another pair or of the other direction.
        """
        place = column.index(self.world.rank)

        def groups(first: int) -> list[dist.ProcessGroup]:
            pair = tuple(sorted(column[first : first + 2]))
            return [self.world.group(pair, way + which) for way in ("forward", "backward")]

        before = Neighbour(column[place - 1], *groups(place - 1)) if place else None
        after = Neighbour(column[place + 1], *groups(place)) if place + 1 < len(column) else None
        return before, after

    def copies_of(self, layer: int | None, name: str) -> tuple[int, ...]:
        """The stages that hold a parameter of a layer, or of the embedding: one unless it is copied."""
        return self.copied.get((layer, name), (self.stage,))

    def group_of_copies(self, stages: tuple[int, ...]) -> dist.ProcessGroup:
        """This rank and those with its place in the other ``stages`` of a copy."""
        return self.world.group(tuple(self.column[stage] for stage in stages), f"copies {stages}")

    @property
    def column(self) -> tuple[int, ...]:
        """Global ranks with this rank's place, one in each stage."""
        return tuple(stage * self.plan.stage_size + self.stage_rank for stage in range(self.plan.pp))

    def group(self, inner: int, outer: int) -> dist.ProcessGroup:
        """The process group of the axes that multiply stacked degree ``inner`` up to ``outer``."""
        return self.world.group(self._ranks(inner, outer))

    def axis_group(
        self, inner: int, outer: int, pieces: int = 1, purpose: str = "", filling: Filling | None = None
    ) -> AxisGroup:
        """The same axes as ``group``, with their sizes and this rank's place, for the sequence collectives."""
        ranks = self._ranks(inner, outer)
        group = self.world.group(ranks, purpose) if len(ranks) > 1 else None
        sizes, rank = self.axes.axes_between(inner, outer), ranks.index(self.world.rank)
        return AxisGroup(group, sizes, rank, pieces, self.folded, filling)

    def ulysses(self, strategy: LayerStrategy, filling: Filling | None = None) -> AxisGroup:
        """The ranks that deal out heads around attention, where tp has gathered its chunks."""
        return self.axis_group(strategy.tp, strategy.tp * strategy.ulysses, strategy.tp, "heads", filling)

    def ring(self, strategy: LayerStrategy) -> AxisGroup:
        """The ranks that pass keys and values on, where tp and Ulysses have gathered theirs."""
        inner = strategy.tp * strategy.ulysses
        return self.axis_group(inner, strategy.sequence_degree, inner, "ring")

    def experts(self, strategy: LayerStrategy) -> ExpertGroups:
        """Whom a layer's tokens go to, if experts are dealt out: ranks with this one's part of every expert's width."""
        inner = strategy.tp * strategy.ep
        both = self.axis_group(1, inner, purpose="routes") if strategy.ep > 1 else ALONE
        return ExpertGroups(self.axis_group(strategy.tp, inner, purpose="experts"), both)

    def spans(self, strategy: LayerStrategy) -> tuple[range, ...]:
        """The positions, ascending, that a unit sees on this rank: its own and those that tp gathers."""
        degree, seq_len = strategy.sequence_degree, self.plan.seq_len
        return self.axes.spans(self.stage_rank, strategy.tp, degree, seq_len, folded=self.folded)

    def rows(self, strategy: LayerStrategy) -> range:
        """The sequences of a microbatch that a unit has on this rank."""
        chunk = self.axes.batch_chunk(self.stage_rank, strategy.sequence_degree)
        own = self.plan.micro_batch_size // strategy.dp
        return range(chunk * own, (chunk + 1) * own)

    def mesh(self, strategy: LayerStrategy) -> DeviceMesh:
        """The (dp_replicate, dp_shard) mesh of a strategy that shards; one-dimensional where nothing is replicated.

        ulysses and cp ranks, which hold the same parameters, shard too.
        """
        key = (strategy.tp, strategy.sequence_degree * strategy.dp_shard, strategy.num_devices)
        if key not in self._meshes:
            self._meshes[key] = self._make_mesh(*key)
        return self._meshes[key]

    def replicas(self, strategy: LayerStrategy) -> dist.ProcessGroup | None:
        """Of the ranks that hold the same unit under a strategy that shards nothing; None where there is one.

        A group of its own: sums that run beside the backward hold up no other message.
        """
        ranks = self._ranks(strategy.tp, strategy.num_devices)
        if len(ranks) == 1:
            return None
        return self.world.group(ranks, "gradients")

    def shard_rank(self, strategy: LayerStrategy) -> int:
        """This rank's index among those over which a strategy shards."""
        return self.stage_rank // strategy.tp % strategy.shard_degree

    def replica_rank(self, strategy: LayerStrategy) -> int:
        """This rank's index among those that hold the same shard under a strategy."""
        return self.stage_rank // (strategy.tp * strategy.shard_degree)

    def expert_rank(self, strategy: LayerStrategy) -> int:
        """This rank's index among those that experts are dealt to."""
        return self.stage_rank // strategy.tp % strategy.ep

    def _make_mesh(self, inner: int, middle: int, outer: int) -> DeviceMesh:
        device_type = self.world.device.type
        shard = self.world.group(self._ranks(inner, middle))
        if middle == outer:
            return DeviceMesh.from_group(shard, device_type, mesh_dim_names=("dp_shard",))
        replicas = self.world.group(self._ranks(middle, outer))
        offsets = torch.tensor(self._ranks(middle, outer)) - self.world.rank
        ranks = offsets[:, None] + torch.tensor(self._ranks(inner, middle))[None, :]
        names = ("dp_replicate", "dp_shard")
        return DeviceMesh.from_group([replicas, shard], device_type, mesh=ranks, mesh_dim_names=names)

    def _ranks(self, inner: int, outer: int) -> tuple[int, ...]:
        base = self.stage * self.plan.stage_size
        return tuple(base + rank for rank in self.axes.group(self.stage_rank, inner, outer))


def _group_shapes(plan: Plan) -> set[tuple[int, int]]:
    """(inner, outer) of every group some layer needs: tp, FSDP2's dp_shard and dp_replicate, changes of layout."""
    shapes: set[tuple[int, int]] = {(1, 1)}
    previous = plan.embedding.sequence_degree
    for strategy in plan.strategies():
        degree = strategy.sequence_degree
        shapes |= {(1, strategy.tp), (min(previous, degree), max(previous, degree))}
        for layout in (strategy, strategy.of_experts):
            if layout.zero:
                sharded = layout.sequence_degree * layout.dp_shard
                shapes |= {(layout.tp, sharded), (sharded, layout.num_devices)}
        previous = degree
    return shapes
