"""All that the search needs to know of a world, measured: ``hardware.json``.

Takes an initialised world and a time budget; gives a HardwareProfile, equal on all ranks.  Knows nothing of
models.
"""

from __future__ import annotations

import torch.distributed as dist

from galvatron.core.hardware import HardwareProfile
from galvatron.parallelize.processes.world import World

from .compute import local_ranks, measure_device
from .device_memory import OutsideGrowth
from .links import measure_links
from .overlap import measure_overlap
from .timing import Progress, agree

SHARES = {"device": 0.15, "overlap": 0.1, "links": 0.75}  # of the budget; links are many and decide plans


def profile_hardware(world: World, *, budget_s: float = 20.0, progress: Progress | None = None) -> HardwareProfile:
    """Collective: measure devices, links and overlap of ``world`` within about ``budget_s`` seconds.

    Every link that a plan for this world can ask for is measured, however small the budget: the budget sets
    how large messages get.  ``progress`` is told of each finished part, on every rank.
    """
    tell = progress or (lambda text: None)
    device = measure_device(world, budget_s=budget_s * SHARES["device"])
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {name}" for name, rate in device.matmul_flops_per_s.items())
    tell(f"{device.name}: {rates}")
    overlap = measure_overlap(world, budget_s=budget_s * SHARES["overlap"])
    tell(f"overlap slows compute {overlap.compute_slowdown:.2f}x, communication {overlap.communication_slowdown:.2f}x")
    growth = OutsideGrowth(world.device)
    links = measure_links(world, budget_s=budget_s * SHARES["links"], progress=progress, watch=growth.look)
    devices_per_node, communicator_bytes = agree([local_ranks(), growth.most_bytes], world.device)
    if world.device.type == "cuda":
        device = device.model_copy(update={"communicator_bytes": int(communicator_bytes)})
    profile = HardwareProfile(
        device=device,
        world_size=world.world_size,
        devices_per_node=int(devices_per_node),
        backend="nccl" if world.device.type == "cuda" else "gloo",
        links=links,
        overlap=overlap,
    )
    shared = [profile]
    dist.broadcast_object_list(shared, src=0, device=world.device)
    return shared[0]
