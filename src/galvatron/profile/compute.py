"""What one device is: its name, its memory, and how fast it multiplies matrices while its neighbours do too.

Takes an initialised world; gives a ``Device``, equal on all ranks.  Knows nothing of models.
"""

from __future__ import annotations

import os
import platform
import re
from contextlib import nullcontext
from pathlib import Path

import torch

from galvatron.core.hardware import Device
from galvatron.core.model import Precision
from galvatron.parallelize.processes.world import World
from galvatron.parallelize.sharding.fsdp import DTYPES

from .timing import Budget, agree, seconds_of, slowest_median

MATMUL_SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}
REPEATS = 5
HOST_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}  # 16 and 128 MiB each way
SHARING_SIZE, SHARING_ITERATIONS = 384, 20  # some 30 ms of one core: longer than the scheduler's time slices


def measure_device(world: World, *, budget_s: float) -> Device:
    """Collective: name, memory and best matrix-multiply rate in each precision of the slowest rank.

    All ranks multiply at once, because ranks of one machine share its cores.  A CPU too slow to finish
    one small product in bf16 or fp16 in its share of ``budget_s`` has no such rate.
    """
    (negative_memory,) = agree([-memory_bytes(world.device)], world.device)
    budget = Budget(budget_s, len(DTYPES))
    rates = {precision: matmul_flops_per_s(precision, world, budget.next_share()) for precision in DTYPES}
    return Device(
        full_speed_fraction=full_speed_fraction(world),
        name=device_name(world.device),
        type="cuda" if world.device.type == "cuda" else "cpu",
        memory_bytes=int(-negative_memory),
        matmul_flops_per_s={precision: rate for precision, rate in rates.items() if rate > 0},
        host_bytes_per_s=host_bytes_per_s(world.device),
    )


def matmul_flops_per_s(precision: Precision, world: World, budget_s: float) -> float:
    """Collective: the best median rate over growing square products; 0 if even the smallest overruns ``budget_s``."""
    best = 0.0
    for size in MATMUL_SIZES[world.device.type]:
        a = torch.randn(size, size, device=world.device).to(DTYPES[precision])
        multiply = lambda a=a: a @ a  # noqa: E731
        multiply()
        (once_s, share_s) = agree([seconds_of(multiply, world.device), budget_s], world.device)
        if once_s * (REPEATS + 2) > share_s:
            break
        best = max(best, 2 * size**3 / slowest_median(multiply, world.device, REPEATS))
        budget_s -= once_s * (REPEATS + 2)
    return best


def host_bytes_per_s(device: torch.device) -> float:
    """Collective: the rate at which the slowest of all ranks takes bytes from host memory and sends as many back."""
    elements = HOST_ELEMENTS[device.type]
    mine = torch.zeros(2, elements, pin_memory=device.type == "cuda")
    there = torch.zeros(2, elements, device=device)
    streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else [None, None]

    def both_ways() -> None:
        for stream, (to, of) in zip(streams, ((there[0], mine[0]), (mine[1], there[1])), strict=True):
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                to.copy_(of, non_blocking=True)

    both_ways()
    return 4 * elements / slowest_median(both_ways, device, REPEATS)


def full_speed_fraction(world: World) -> float:
    """Collective: seconds of a product on one rank of each machine alone over those on all at once; 1 on CUDA."""
    if world.device.type == "cuda" or local_ranks() == 1:
        return 1.0
    a = torch.randn(SHARING_SIZE, SHARING_SIZE)
    multiply = lambda: a @ a  # noqa: E731
    alone = multiply if world.local_rank == 0 else lambda: None
    alone_s = slowest_median(alone, world.device, REPEATS, SHARING_ITERATIONS)
    together_s = slowest_median(multiply, world.device, REPEATS, SHARING_ITERATIONS)
    return min(max(alone_s / together_s, 1 / local_ranks()), 1.0)


def device_name(device: torch.device) -> str:
    """The product name that the driver or the operating system gives."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def memory_bytes(device: torch.device) -> int:
    """Bytes one rank may use: the GPU's memory, or an equal share of the machine's (or its control group's) RAM."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # cgroup v2: "max" or bytes
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text) if text.isdigit() else total) // local_ranks()


def local_ranks() -> int:
    """Ranks on this machine, as torchrun says in LOCAL_WORLD_SIZE; without it, all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
