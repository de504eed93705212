"""How long collectives and messages take over every group of ranks that a plan may use.

Takes an initialised world and a time budget; gives one fitted ``Link`` for every operation and group shape
(``plan.groups``), equal on all ranks.  Knows nothing of models or plans.

All groups of one shape run at once, as they do in training, so links shared by several groups show their
contention.  For p2p every rank of the world sends to the rank ``stride`` above it, all at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from galvatron.core.fit import Sample, fit_line, residual
from galvatron.core.hardware import OPS, Link, Op
from galvatron.core.units import format_bytes, format_seconds
from galvatron.parallelize.processes.world import World
from galvatron.plan.groups import group_shapes, groups_of, p2p_strides

from .timing import Budget, Progress, agree, seconds_of, slowest_median

FIRST_BYTES = 4 * 1024
GROWTH = 4
LARGEST_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
NEVER_SKIPPED_BYTES = 256 * 1024  # below, α and β cannot be told apart
MIN_REPEATS, MAX_REPEATS = 3, 7
BURST_S, MAX_BURST = 8e-3, 20  # short operations are timed in bursts, so that the ranks' skew at the start drowns

# torch 2.13 renamed these two; 2.11 knows only the older names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def measure_links(
    world: World,
    *,
    budget_s: float,
    progress: Progress | None = None,
    watch: Callable[[], None] = lambda: None,
) -> tuple[Link, ...]:
    """Collective: a Link for every operation over every group shape of the world, in a fixed order.

    Sizes grow from 4 KiB by a factor of 4 as far as each operation's share of ``budget_s`` allows, 256 KiB at
    least.  ``progress`` is told of every finished link, on every rank; ``watch`` is called whenever a group is still
    there after all of its links.  Empty for a world of one.
    """
    shapes, strides = group_shapes(world.world_size), p2p_strides(world.world_size)
    collectives = [op for op in OPS if op != "p2p"]
    budget = Budget(budget_s, len(shapes) * len(collectives) + len(strides))
    links = []
    for size, stride in shapes:
        # new groups are collective over the world: every rank makes all of them, in this one order
        group, _ = dist.new_subgroups_by_enumeration(
            [list(ranks) for ranks in groups_of(world.world_size, size, stride)]
        )
        for op in collectives:
            run = _collective(op, size, group, world.device)
            links.append(_measure(op, size, stride, run, world, budget.next_share(), progress))
        dist.barrier()
        watch()
        dist.destroy_process_group(group)
    for stride in strides:
        links.append(_measure("p2p", 2, stride, _shift(stride, world), world, budget.next_share(), progress))
    return tuple(links)


Operation = Callable[[int], tuple[int, Callable[[], object]]]
"""Given wished bytes: the bytes really moved, and a function that moves them once."""


def _measure(
    op: Op, size: int, stride: int, operation: Operation, world: World, share_s: float, progress: Progress | None
) -> Link:
    samples = _samples(operation, world.device, share_s)
    line = fit_line(samples)
    link = Link(
        op=op,
        size=size,
        stride=stride,
        latency_s=line[0],
        seconds_per_byte=line[1],
        residual=residual(line, samples),
        samples=tuple(samples),
    )
    if progress is not None:
        last_bytes, last_s = samples[-1]
        progress(f"{op} over {size} ranks, stride {stride}: {format_bytes(last_bytes)} in {format_seconds(last_s)}")
    return link


def _samples(operation: Operation, device: torch.device, share_s: float) -> list[Sample]:
    """(bytes, seconds) at growing sizes until the slowest rank's clock has no room for the next."""
    start, samples, num_bytes = time.perf_counter(), list[Sample](), FIRST_BYTES
    while num_bytes <= LARGEST_BYTES[device.type]:
        spent, share = agree([time.perf_counter() - start, share_s], device)
        expected = samples[-1][1] * GROWTH if samples else 0.0
        room = (share - spent) / (expected * GROWTH / (GROWTH - 1)) if expected else MAX_REPEATS
        if num_bytes > NEVER_SKIPPED_BYTES and room < MIN_REPEATS + 1:
            break
        actual_bytes, run = operation(num_bytes)
        samples.append((actual_bytes, _seconds(run, device, int(room) - 1)))
        num_bytes *= GROWTH
    return samples


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    run()  # warm-up: the first call of a size connects peers and touches the buffers
    (once_s,) = agree([seconds_of(run, device)], device)
    burst = min(max(int(BURST_S / max(once_s, 1e-9)), 1), MAX_BURST)
    return slowest_median(run, device, min(max(repeats, MIN_REPEATS), MAX_REPEATS), burst)


def _collective(op: Op, size: int, group: dist.ProcessGroup, device: torch.device) -> Operation:
    """``op`` in ``group`` on fp32 tensors; bytes count the whole tensor as ``core.hardware`` defines."""

    def prepare(num_bytes: int) -> tuple[int, Callable[[], object]]:
        count = -(-num_bytes // (4 * size))  # elements of one rank's part
        whole, part = torch.zeros(count * size, device=device), torch.zeros(count, device=device)
        run: Callable[[], object]
        if op == "all_reduce":
            run = lambda: dist.all_reduce(whole, group=group)  # noqa: E731
        elif op == "all_gather":
            run = lambda: _all_gather(whole, part, group=group)  # noqa: E731
        elif op == "reduce_scatter":
            run = lambda: _reduce_scatter(part, whole, group=group)  # noqa: E731
        else:
            received = torch.empty_like(whole)
            run = lambda: dist.all_to_all_single(received, whole, group=group)  # noqa: E731
        return whole.numel() * 4, run

    return prepare


def _shift(stride: int, world: World) -> Operation:
    """Every rank sends one message to the rank ``stride`` above it, where there is one."""

    def prepare(num_bytes: int) -> tuple[int, Callable[[], object]]:
        sent = torch.zeros(num_bytes // 4, device=world.device)
        received = torch.empty_like(sent)

        def run() -> None:
            operations = []
            if world.rank + stride < world.world_size:
                operations.append(dist.P2POp(dist.isend, sent, world.rank + stride))
            if world.rank >= stride:
                operations.append(dist.P2POp(dist.irecv, received, world.rank - stride))
            for work in dist.batch_isend_irecv(operations):
                work.wait()

        return num_bytes, run

    return prepare
