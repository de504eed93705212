"""What a script has set for all of torch, and steps would compute otherwise by.

Takes nothing; raises.  A plan says the precision, so a default dtype or autocast of the caller's contradicts it, and
neither is heard by all that a step does.
"""

from __future__ import annotations

import torch

from galvatron.core.errors import ConfigError


def check_surroundings(device: torch.device, *, gradients: bool) -> None:
    """Raise ConfigError where torch's global settings would change what is computed on ``device``.

    ``gradients``: they are asked for.  (Buffers made in inference mode would stay unfit for them.)
    """
    if torch.get_default_dtype() != torch.float32:
        raise ConfigError(
            f"torch.set_default_dtype({torch.get_default_dtype()}) is in effect, but weights and sums are float32; set "
            "torch.float32 before parallelize, and the plan's precision for what is computed"
        )
    if torch.is_autocast_enabled(device.type):
        raise ConfigError(
            f"torch.autocast is in effect for {device.type}, but the plan says the precision; leave autocast, "
            "and set the plan's precision to bf16 or fp16 if that is meant"
        )
    if torch.is_inference_mode_enabled() or (gradients and not torch.is_grad_enabled()):
        mode = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
        raise ConfigError(f"torch.{mode} is in effect, under which nothing can be trained; leave it")
