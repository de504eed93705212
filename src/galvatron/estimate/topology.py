"""Seconds of every collective on nodes of equal devices, from bandwidths and latencies alone.

Takes the rates of two tiers (within a node, between nodes); gives Link records.  Ranks fill one node after the
other.  A group is ``size`` ranks ``stride`` apart, and all groups of a shape run at once, so that the slowest counts.
Knows nothing of products.

Bandwidths are bytes a second that one device sends while every device does (a ring's *bus* bandwidth); Link's
seconds per byte count whole tensors (*algorithm* bandwidth), as ``core.hardware`` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from galvatron.core.hardware import Link, Op
from galvatron.core.records import Record
from galvatron.plan.groups import group_shapes, p2p_strides

RING_PASSES: dict[Op, int] = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""How often (n - 1) / n of the tensor passes every link of a ring of n (Thakur et al. 2005, sections 4.1 to 4.4)."""
START_S = 8.4e-6
"""What a collective takes before its first hop.  [NCCL 2.20's own model of its Simple protocol, which large messages
take: ``baseLat`` in src/graph/tuning.cc]"""


class Topology(Record):
    """Nodes of ``devices_per_node`` devices: what one device sends within its node and out of it.

    ``intra_peer_bytes_per_s``: most of it that goes to any one device of its node.  ``inter_bytes_per_s``: its own
    share of the network (one adapter a device, all of a node's usable by the members of one group there).  Latencies
    are of one hop.
    """

    nodes: int
    devices_per_node: int
    intra_bytes_per_s: float
    intra_peer_bytes_per_s: float
    intra_latency_s: float
    inter_bytes_per_s: float
    inter_latency_s: float

    @property
    def world_size(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.devices_per_node

    def links(self) -> tuple[Link, ...]:
        """A link for every operation of every group that a stage of this world can form."""
        groups = [link for size, stride in group_shapes(self.world_size) for link in self._group_links(size, stride)]
        return (*groups, *map(self._p2p, p2p_strides(self.world_size)))

    def _group_links(self, size: int, stride: int) -> Iterator[Link]:
        members = self.members_per_node(size, stride)
        tree_s, ring_s = self._tree_s(size, members), self._ring_s(size, members)
        for op, passes in RING_PASSES.items():
            seconds = passes * (size - 1) / size / self._ring_bytes_per_s(size, members)
            latency_s = START_S + (2 * tree_s if op == "all_reduce" else ring_s)
            yield Link(op=op, size=size, stride=stride, latency_s=latency_s, seconds_per_byte=seconds)
        seconds = self._all_to_all_s_per_byte(size, members)
        yield Link(op="all_to_all", size=size, stride=stride, latency_s=START_S + tree_s, seconds_per_byte=seconds)

    def members_per_node(self, size: int, stride: int) -> int:
        """The fewest ranks that any group of that shape has in a node it touches; ``size`` where no group leaves.

        Where strides do not divide nodes, groups begin at different places in their nodes; only the place counts.
        """
        return min(self._fewest_members(size, stride, place) for place in self._places(size, stride))

    def _places(self, size: int, stride: int) -> set[int]:
        """Where groups begin within their nodes: blocks of size x stride ranks hold ``stride`` groups side by side."""
        block, node = size * stride, self.devices_per_node
        period = min(self.world_size // block, node // math.gcd(block, node))
        return {(i * block + j) % node for i in range(period) for j in range(min(stride, node))}

    def _fewest_members(self, size: int, stride: int, place: int) -> int:
        last = place + (size - 1) * stride
        if last < self.devices_per_node:
            return size
        first_node = math.ceil((self.devices_per_node - place) / stride)
        last_node = last % self.devices_per_node // stride + 1
        between = max(self.devices_per_node // stride, 1)
        touched = last // self.devices_per_node + 1
        return min(first_node, last_node, between if touched > 2 else first_node)

    def _ring_bytes_per_s(self, size: int, members: int) -> float:
        """A ring's bus bandwidth: between nodes it enters and leaves by the adapters of all its members there."""
        within = self._intra_bytes_per_s(members)
        return within if members == size else min(within, members * self.inter_bytes_per_s)

    def _intra_bytes_per_s(self, members: int) -> float:
        """What one of ``members`` in a node sends to the others: all it can, but no peer more than a link carries."""
        return min(self.intra_bytes_per_s, max(members - 1, 1) * self.intra_peer_bytes_per_s)

    def _all_to_all_s_per_byte(self, size: int, members: int) -> float:
        """Each rank sends 1 / size of its input to every other: within the node and out of it at the same time."""
        within_s = (members - 1) / size / self._intra_bytes_per_s(members)
        leaving_s = (size - members) / size / self.inter_bytes_per_s
        return max(within_s, leaving_s)

    def _ring_s(self, size: int, members: int) -> float:
        """Hops of gathers and reduce-scatters, which NCCL sends around a ring: one for every rank but the first.

        Each rank waits for what its neighbour sends before it passes that on, so latency grows with the ranks (NCCL's
        ``ncclTopoTuneModel``: ranks - nodes hops within nodes, nodes - 1 between them).
        """
        nodes = math.ceil(size / members)
        return self.intra_latency_s * (size - nodes) + self.inter_latency_s * (nodes - 1)

    def _tree_s(self, size: int, members: int) -> float:
        """Hops up or down NCCL's trees, which all-reduces take where a ring would take longer: a chain over a node's
        members, then log2 over the nodes.  [Assumed for all-to-alls: their messages travel side by side]"""
        return self.intra_latency_s * (members - 1) + self.inter_latency_s * _hops(math.ceil(size / members))

    def _p2p(self, stride: int) -> Link:
        """A message from every rank to the one ``stride`` later; with several nodes some of them cross."""
        crosses = self.nodes > 1
        rate = self.inter_bytes_per_s if crosses else self._intra_bytes_per_s(2)
        latency_s = self.inter_latency_s if crosses else self.intra_latency_s
        return Link(op="p2p", size=2, stride=stride, latency_s=START_S + latency_s, seconds_per_byte=1 / rate)


def _hops(count: int) -> int:
    return math.ceil(math.log2(count))
