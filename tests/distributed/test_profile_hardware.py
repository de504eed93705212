from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from galvatron.core.hardware import OPS, HardwareProfile
from galvatron.plan.axes import StageAxes, divisors
from galvatron.profile import profile_hardware


def _profile(budget_s: float) -> tuple[str, list[str]]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    world = SimpleNamespace(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
    told: list[str] = []
    return profile_hardware(world, budget_s=budget_s, progress=told.append).to_json(), told


@pytest.mark.parametrize("world_size", [1, 4])
def test_profile_holds_every_link_a_plan_can_ask_for(pool, world_size):
    answers = pool.run(_profile, 1.0, world_size=world_size)
    assert len({text for text, _ in answers}) == 1, "ranks disagree"
    profile = HardwareProfile.from_json(answers[0][0])
    assert (profile.world_size, profile.devices_per_node, profile.backend) == (world_size, world_size, "gloo")
    for stage_size in divisors(world_size):
        degrees = StageAxes(stage_size).degrees
        shapes = [(outer // inner, inner) for inner in degrees for outer in degrees if outer > inner]
        links = [profile.link(op, *shape) for op in OPS if op != "p2p" for shape in shapes]
        if stage_size < world_size:
            links.append(profile.link("p2p", 2, stage_size))
        for link in links:
            assert link.time_s(2**20) > 0
            assert link.latency_s >= 0
            assert link.seconds_per_byte >= 0
            assert [num_bytes for num_bytes, _ in link.samples][:4] == [4096, 16384, 65536, 262144]
    assert len(answers[0][1]) == 2 + len(profile.links)


def test_profile_describes_the_device(pool):
    profile = HardwareProfile.from_json(pool.run(_profile, 1.0, world_size=2)[0][0])
    assert profile.device.type == "cpu"
    assert profile.device.name
    assert profile.device.memory_bytes > 2**27
    assert profile.device.matmul_flops_per_s["fp32"] > 1e6
    assert profile.overlap.compute_slowdown >= 1
    assert profile.overlap.communication_slowdown >= 1
