"""What more memory, a faster network or more nodes would buy: the same search on a changed cluster.

Takes a search to run again and the cluster; gives changes with the plans that they allow.  Knows nothing of how the
search works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from galvatron.core.errors import InfeasibleError
from galvatron.core.hardware import HardwareProfile, Link
from galvatron.estimate import ClusterShape
from galvatron.plan.plan import Plan

from .result import SearchResult

SearchAgain = Callable[[HardwareProfile, int], SearchResult]
"""The same search on another cluster, with another memory limit in bytes a device."""

MORE_MEMORY_BYTES = 8 * 2**30
NODE_FACTORS = (2, 4, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What is changed, in words, and the plan that it allows; None where there is none."""

    words: str
    plan: Plan | None


def sensitivity(
    again: SearchAgain, hardware: HardwareProfile, memory_limit_bytes: int, shape: ClusterShape | None = None
) -> tuple[Change, ...]:
    """What another 8 GiB a device, twice the bandwidth between nodes and another node would buy.

    Args:
        again: the search to repeat.
        hardware: the cluster as it is.
        memory_limit_bytes: per device, as it is.
        shape: where the cluster is a preset, which other numbers of nodes can be had of.
    """
    changes = [
        Change(words="another 8 GiB a device", plan=_plan(again, hardware, memory_limit_bytes + MORE_MEMORY_BYTES))
    ]
    if hardware.world_size > hardware.devices_per_node:
        faster = shape.with_faster_network(2).profile() if shape else faster_network(hardware, 2)
        words = "twice the bandwidth between nodes"
        changes.append(Change(words=words, plan=_plan(again, faster, memory_limit_bytes)))
    return (*changes, *(_more_nodes(again, shape, memory_limit_bytes) if shape else ()))


def what_would_fit(again: SearchAgain, memory_limit_bytes: int, shape: ClusterShape) -> ClusterShape | None:
    """The smallest of 2, 4, 8 and 16 times the nodes on which some plan fits; None if none of them does."""
    for factor in NODE_FACTORS:
        larger = shape.with_nodes(factor * shape.nodes)
        if _plan(again, larger.profile(), memory_limit_bytes) is not None:
            return larger
    return None


def faster_network(hardware: HardwareProfile, factor: float) -> HardwareProfile:
    """The same cluster with ``factor`` times the bandwidth of every link that leaves a node; latencies stay."""

    def leaves(link: Link) -> bool:
        reach = link.stride if link.op == "p2p" else link.size * link.stride - 1
        return reach >= hardware.devices_per_node

    links = (
        link.model_copy(update={"seconds_per_byte": link.seconds_per_byte / factor}) if leaves(link) else link
        for link in hardware.links
    )
    fields = {name: getattr(hardware, name) for name in type(hardware).model_fields}
    return HardwareProfile(**{**fields, "links": tuple(links)})


def _more_nodes(again: SearchAgain, shape: ClusterShape, limit: int) -> Iterator[Change]:
    """One node more, and twice the nodes where the batch and the model do not divide over one more."""
    for nodes in (shape.nodes + 1, 2 * shape.nodes):
        larger = shape.with_nodes(nodes)
        plan = _plan(again, larger.profile(), limit)
        words = "another node" if nodes == shape.nodes + 1 else "twice the nodes"
        yield Change(words=f"{words} ({larger.world_size:,} devices)", plan=plan)
        if plan is not None:
            return


def _plan(again: SearchAgain, hardware: HardwareProfile, limit: int) -> Plan | None:
    try:
        return again(hardware, limit).plan
    except InfeasibleError:
        return None
