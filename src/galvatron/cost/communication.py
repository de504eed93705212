"""Seconds of every communication that a plan causes, from measured links.

Every function takes a Setting and sizes; sizes count as ``core.hardware`` says.  A group of one rank takes no time.
"""

from __future__ import annotations

import numpy as np

from galvatron.core.hardware import Op, Overlap
from galvatron.core.model import UnitName

from .setting import Setting
from .strategies import Floats, Ints


def collective_s(
    setting: Setting, op: Op, size: Ints | int, stride: Ints | int, num_bytes: Floats | Ints | float
) -> Floats:
    """One collective over groups of ``size`` ranks ``stride`` apart, for every row; 0 for a group of one."""
    latency_s, seconds_per_byte = setting.links(op, np.asarray(size), np.asarray(stride))
    return latency_s + num_bytes * seconds_per_byte


def redistribution_s(setting: Setting, unit: UnitName, before: int, after: int) -> float:
    """One all-to-all into ``unit`` from hidden states that are cut ``before`` ways by sequence to ``after`` ways.

    It runs over just the axes between the two degrees; every rank puts in all it holds.
    """
    return float(redistributions_s(setting, unit, np.array([before, after], dtype=np.int64))[0, 1])


def redistributions_s(setting: Setting, unit: UnitName, degrees: Ints) -> Floats:
    """The same between any two of ``degrees``: [before, after]."""
    inner, outer = np.minimum.outer(degrees, degrees), np.maximum.outer(degrees, degrees)
    return collective_s(setting, "all_to_all", outer // inner, inner, setting.hidden_bytes(unit))


def transfer_s(setting: Setting, unit: UnitName, degree: int | None = None) -> float:
    """What enters ``unit`` of one microbatch, from one rank to the next stage, tensor by tensor; 0 without stages.

    ``degree``: by how many sequences are cut that are sent, if it is known.
    """
    if setting.pp == 1:
        return 0.0
    link = setting.link("p2p", 2, setting.stage_size)
    num_bytes = setting.entering_bytes(unit, degree)
    return setting.entering_tensors(unit) * link.latency_s + num_bytes * link.seconds_per_byte


def tied_reduction_s(setting: Setting, num_bytes: Floats | Ints) -> Floats:
    """The all-reduce of the tied weight's gradient between first and last stage.

    Two stages mostly are an axis of the world.  More are not, and their all-reduce is not measured: it is taken as
    one message each way between neighbouring stages.
    """
    if setting.pp == 2 and setting.hardware.has_link("all_reduce", 2, setting.stage_size):
        return collective_s(setting, "all_reduce", 2, setting.stage_size, num_bytes)
    return 2 * collective_s(setting, "p2p", 2, setting.stage_size, num_bytes)


def overlapped_s(compute_s: Floats | float, communication_s: Floats | float, overlap: Overlap) -> Floats:
    """Seconds until both are done when they start together and slow each other while both run.

    With slowdowns a (compute) and b (communication): if communication ends first, it took b·d while compute
    did b·d / a of its work, and the rest goes on at full speed; and the other way round.
    """
    a, b = overlap.compute_slowdown, overlap.communication_slowdown
    compute_last = compute_s + b * communication_s * (1 - 1 / a)
    communication_last = communication_s + a * compute_s * (1 - 1 / b)
    return np.where(b * communication_s <= a * compute_s, compute_last, communication_last)


def exposed_s(setting: Setting, compute_s: Floats, communication_s: Floats) -> Floats:
    """What communication on a stream of its own adds to ``compute_s``: all of it where nothing overlaps."""
    if not setting.overlaps:
        return communication_s
    return overlapped_s(compute_s, communication_s, setting.hardware.overlap) - compute_s
