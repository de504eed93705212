"""What this cluster and this model do, measured.

Takes an initialised world and a Hugging Face model; gives ``HardwareProfile`` and ``ModelProfile``.  Knows
nothing of costs, plans' merits or training.
"""

from .hardware import profile_hardware

__all__ = ["profile_hardware"]
