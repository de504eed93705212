"""Bytes that a process takes of its device beyond its tensors: none that count on CPUs.

Takes a Setting and a limit, or the bytes of tensors; gives bytes.
"""

from __future__ import annotations

import math

from .setting import Setting

CUDA_CONTEXT_BYTES = 2**30
"""CUDA context, libraries and NCCL buffers of one process: outside PyTorch's allocator, so not in its statistics.
[Assumed: 1 GiB, where no profile has measured it]"""

CUDA_ALLOCATOR_SLACK = 0.03
"""What PyTorch's CUDA allocator reserves beyond what is allocated.  [Assumed: 3%, where no profile has measured it]"""

COMMUNICATORS = 4
"""Groups beside the world that a rank communicates in: tp, shards, replicas and the neighbouring stages.  [Assumed]"""


def usable_bytes(setting: Setting, memory_limit_bytes: int) -> int:
    """How many bytes of tensors fit under the limit, context and allocator slack taken off (CUDA alone)."""
    if not setting.overlaps:
        return memory_limit_bytes
    return int((memory_limit_bytes - _outside_bytes(setting)) / (1 + _slack_fraction(setting)))


def runtime_bytes(setting: Setting, tensor_bytes: int) -> int:
    """What the process takes beyond its tensors: the inverse of ``usable_bytes``."""
    return _outside_bytes(setting) + math.ceil(tensor_bytes * _slack_fraction(setting)) if setting.overlaps else 0


def _outside_bytes(setting: Setting) -> int:
    """What a CUDA process takes outside the allocator: measured with the world's communicator, further ones added."""
    context_bytes, device = setting.model.context_bytes, setting.hardware.device
    if context_bytes is None:
        return CUDA_CONTEXT_BYTES
    further = COMMUNICATORS if setting.hardware.world_size > 1 else 0
    return context_bytes + further * (device.communicator_bytes or 0)


def _slack_fraction(setting: Setting) -> float:
    """What the allocator reserves beyond what is allocated, as a part of that."""
    measured = setting.model.allocator_slack_fraction
    return CUDA_ALLOCATOR_SLACK if measured is None else measured
