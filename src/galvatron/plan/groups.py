"""Which groups of ranks a plan may communicate in: the shapes a hardware profile must hold.

Takes a world size; gives group shapes and their ranks.  Knows nothing of torch or of time.

A stage of n devices communicates in groups of the axes between two stacked degrees (``plan.axes``): ``size``
ranks, ``stride`` apart.  Groups of one shape tile the whole world, whatever stage size asked for them, because
size × stride divides n and n divides the world.
"""

from __future__ import annotations

from .axes import StageAxes, divisors


def group_shapes(world_size: int) -> tuple[tuple[int, int], ...]:
    """Every (size, stride) with size > 1 that some stage size of the world can ask for, ascending."""
    shapes = set()
    for stage_size in divisors(world_size):
        degrees = StageAxes(stage_size).degrees
        shapes |= {(outer // inner, inner) for inner in degrees for outer in degrees if outer > inner}
    return tuple(sorted(shapes))


def p2p_strides(world_size: int) -> tuple[int, ...]:
    """Distances between a rank and its peer in the next stage: the stage sizes below the world, ascending."""
    return tuple(n for n in divisors(world_size) if n < world_size)


def groups_of(world_size: int, size: int, stride: int) -> tuple[tuple[int, ...], ...]:
    """The groups of that shape, each ascending; every rank of the world is in exactly one."""
    starts = (block + i for block in range(0, world_size, size * stride) for i in range(stride))
    return tuple(tuple(start + i * stride for i in range(size)) for start in starts)
