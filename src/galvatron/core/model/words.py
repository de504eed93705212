"""What units are called, and what is chosen for them: precisions, levels of recompute, what is kept in host memory."""

from __future__ import annotations

from typing import Literal, get_args

UnitName = str
"""``embedding``, ``head`` or the name of a kind of layer (``layer`` where all are equal)."""
ENDS: tuple[UnitName, UnitName] = ("embedding", "head")
Origin = Literal["measured", "imported", "estimated"]
Precision = Literal["fp32", "bf16", "fp16"]
"""What is computed in; parameters and optimizer states are always fp32."""
ReduceDtype = Literal["fp32", "bf16"]
"""What gradients are summed in; fp16 would overflow."""
Recompute = Literal["none", "selective", "mlp", "linears", "full"]
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)
"""What a layer's backward pass runs again: every level all that the one before it does, and more, to keep less.

``selective``: all but linears and attention; ``mlp``: linears of the MLP too; ``linears``: all but attention.
"""

Offload = Literal["none", "optimizer"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
"""What of a unit is in host memory between updates: nothing, or AdamW's moments."""
