"""Whether a search has a sense before it begins, and what emptied its space where it has no plan at all.

Takes profiles, batches and limits; raises or gives sentences.
"""

from __future__ import annotations

from collections.abc import Sequence

from galvatron.core.errors import ConfigError, ProfileError
from galvatron.core.hardware import HardwareProfile
from galvatron.core.model import ENDS
from galvatron.core.model_profile import ModelProfile
from galvatron.core.numbers import MAX_BYTES, MAX_SEQUENCES
from galvatron.cost.setting import Setting
from galvatron.estimate.devices import same_device
from galvatron.plan.axes import divisors
from galvatron.plan.rules import listed

from .baselines import FAMILIES, leanest
from .builder import SpaceBuilder
from .limits import Limits
from .solve import UNLIMITED
from .tasks import suits, tasks

DEGREES = ("pp", "tp", "ulysses", "cp", "ep", "dp_shard", "dp_replicate")
STATE_BYTES = 16  # of a parameter with its gradient and two moments, in float32


def check_question(model: ModelProfile, hardware: HardwareProfile, batches: Sequence[int], limits: Limits) -> None:
    """Raise ConfigError or ProfileError where no search could answer: see ``search`` for what."""
    if not batches or not all(1 <= batch <= MAX_SEQUENCES for batch in batches):
        raise ConfigError(
            f"global_batch_size must be from 1 to {MAX_SEQUENCES:,}, got {list(batches)}; give the sequences of a step"
        )
    problem = model.spec.sequence_problem(model.seq_len) or limits.problem() or _undivided(hardware, batches, limits)
    if problem:
        raise ConfigError(problem)
    if model.spec.ends_alike:
        limits.of_tied_ends()
    ep = limits.fix.get("ep")
    if isinstance(ep, int) and ep > 1 and not any(kind.num_experts for kind in model.spec.layers):
        raise ConfigError(f"ep={ep} deals out experts and {model.spec.name} has none; leave ep out")
    if model.fp8 and limits.fix.get("schedule") == "zero_bubble":
        raise ConfigError("fp8 products have no backward in two passes, as schedule=zero_bubble has; leave one out")
    pp = limits.fix.get("pp")
    if isinstance(pp, int) and pp > model.spec.num_layers:
        raise ConfigError(f"pp={pp} must not exceed the model's {model.spec.num_layers} layers; lower pp")
    if not same_device(model.device, hardware.device.name):
        raise ProfileError(
            f"the model profile is of {model.device} but the cluster's devices are {hardware.device.name}; profile "
            "the model there, or give its name or config.json to estimate it"
        )
    if _most_bytes(model, batches[-1]) > MAX_BYTES:
        raise ConfigError(
            f"{batches[-1]:,} sequences of {model.spec.name} would take more than {MAX_BYTES:,} bytes, more than any "
            "cluster has; lower global_batch_size"
        )


def _undivided(hardware: HardwareProfile, batches: Sequence[int], limits: Limits) -> str | None:
    degrees = [name for name in limits.fix if name.rpartition(".")[2] in DEGREES]
    wanted = [(name, "world_size", hardware.world_size) for name in degrees]
    wanted += [("num_microbatches", "global_batch_size", batch) for batch in batches]
    for name, of_name, of in wanted:
        value = limits.fix.get(name)
        if isinstance(value, int) and of % value:
            return f"{name}={value} must divide {of_name}={of}; choose {listed(divisors(of))}"
    return None


def _most_bytes(model: ModelProfile, batch: int) -> int:
    """What all sequences of a step leave behind at once on one rank, with all states: no count of bytes is larger."""
    counts = {**dict.fromkeys(ENDS, 1), **{kind.name: kind.count for kind in model.spec.layers}}
    kept: dict[str, int] = {}
    for sample in model.activations:
        bytes_ = sample.fixed_bytes + sample.bytes_per_sequence + sample.workspace_bytes_per_sequence
        kept[sample.unit] = max(kept.get(sample.unit, 0), bytes_)
    entering = max(kind.entering_elements(kind.tokens(model.seq_len)) for kind in model.spec.layers) * STATE_BYTES
    activations = sum(counts.get(unit, 1) * (bytes_ + entering) for unit, bytes_ in kept.items())
    return batch * activations + model.spec.num_parameters * STATE_BYTES


def why_empty(setting: Setting, limits: Limits, batches: Sequence[int]) -> str:
    """Which limits leave no plan at all: those without any one of which there would be some."""
    spec, world = setting.model.spec, setting.hardware.world_size
    what = (
        f"no plan of {spec.name} at seq_len={setting.seq_len}, global_batch_size={listed(batches)} on {world} devices"
    )
    words, looser = zip(*limits.without_one(), strict=True) if any(limits.without_one()) else ((), ())
    guilty = [word for word, left in zip(words, looser, strict=True) if _has_plans(setting, left, batches)]
    if len(guilty) == 1:
        return f"{guilty[0]} leaves {what}; drop or change it"
    if guilty:
        return f"{' and '.join(guilty)} together leave {what}; drop or change one of them"
    if words and _has_plans(setting, Limits(), batches):
        return f"{', '.join(words)} together leave {what}; loosen them"
    return f"there is {what}: no strategy divides them over the devices; change one of these numbers"


def _has_plans(setting: Setting, limits: Limits, batches: Sequence[int]) -> bool:
    """Whether any task has a strategy for every unit, whatever fits."""
    builder = SpaceBuilder(setting, limits, UNLIMITED)
    node = setting.hardware.devices_per_node
    spec = setting.model.spec
    for task in tasks(setting.hardware.world_size, spec.num_layers, batches, limits):
        if not suits(task, spec):
            continue
        space = builder.build(task, UNLIMITED)
        if limits.space in FAMILIES:
            if FAMILIES[limits.space].tasks(task) and leanest(space, limits.space, node) is not None:
                return True
        elif space.alternatives:
            return True
    return False
