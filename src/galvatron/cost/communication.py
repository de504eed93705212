"""Seconds of every communication that a plan causes, from measured links.

Every function takes a Setting and sizes; sizes count as ``core.hardware`` says.  A group of one rank takes no time.
"""

from __future__ import annotations

from galvatron.core.hardware import Op, Overlap

from .setting import Setting


def collective_s(setting: Setting, op: Op, size: int, stride: int, num_bytes: float) -> float:
    """One collective over groups of ``size`` ranks ``stride`` apart; 0 for a group of one."""
    return 0.0 if size == 1 else setting.link(op, size, stride).time_s(num_bytes)


def redistribution_s(setting: Setting, before: int, after: int) -> float:
    """One all-to-all between layers whose hidden states are cut ``before`` and ``after`` ways by sequence.

    It runs over just the axes between the two degrees; every rank puts in all it holds.
    """
    if before == after:
        return 0.0
    inner, outer = sorted((before, after))
    return collective_s(setting, "all_to_all", outer // inner, inner, setting.boundary_bytes)


def transfer_s(setting: Setting) -> float:
    """One rank's hidden states of one microbatch to the same rank of the next stage; 0 without a pipeline."""
    if setting.pp == 1:
        return 0.0
    return setting.link("p2p", 2, setting.stage_size).time_s(setting.boundary_bytes)


def tied_reduction_s(setting: Setting, num_bytes: float) -> float:
    """The all-reduce of the tied weight's gradient between first and last stage.

    Two stages are an axis of the world.  More are not, and their all-reduce is not measured: it is taken as one
    message each way between neighbouring stages.
    """
    if setting.pp == 2:
        return collective_s(setting, "all_reduce", 2, setting.stage_size, num_bytes)
    return 2 * setting.link("p2p", 2, setting.stage_size).time_s(num_bytes)


def overlapped_s(compute_s: float, communication_s: float, overlap: Overlap) -> float:
    """Seconds until both are done when they start together and slow each other while both run.

    With slowdowns a (compute) and b (communication): if communication ends first, it took b·d while compute
    did b·d / a of its work, and the rest goes on at full speed; and the other way round.
    """
    a, b = overlap.compute_slowdown, overlap.communication_slowdown
    if b * communication_s <= a * compute_s:
        return compute_s + b * communication_s * (1 - 1 / a)
    return communication_s + a * compute_s * (1 - 1 / b)


def exposed_s(setting: Setting, compute_s: float, communication_s: float) -> float:
    """What FSDP2's communication adds to ``compute_s``: all of it where nothing overlaps."""
    if not setting.overlaps:
        return communication_s
    return overlapped_s(compute_s, communication_s, setting.hardware.overlap) - compute_s
