"""To and from other systems' files.

Takes Hetu-Galvatron's measured profiles and plans; gives profiles and plans of this project.  Takes plans; gives
Hetu-Galvatron's plan file, torchtitan's configuration and Megatron-LM's arguments, or one sentence on what those
cannot say.  Knows nothing of torch, of costs or of how a plan was found.
"""

from .hetu_hardware import import_hardware
from .hetu_plan import export_plan, import_plan
from .hetu_profiles import import_model
from .megatron import to_megatron
from .specs import card_of_file, named_spec
from .torchtitan import to_torchtitan

__all__ = [
    "card_of_file",
    "export_plan",
    "import_hardware",
    "import_model",
    "import_plan",
    "named_spec",
    "to_megatron",
    "to_torchtitan",
]
