"""What this cluster and this model do, measured.

Takes an initialised world and a Hugging Face config; gives ``HardwareProfile`` and ``ModelProfile``.  Knows
nothing of costs, plans' merits or training.
"""

from .hardware import profile_hardware
from .model import profile_model

__all__ = ["profile_hardware", "profile_model"]
