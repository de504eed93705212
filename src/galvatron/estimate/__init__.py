"""Hardware without hardware, models without a framework: clusters and models from names and configurations.

Takes names, config files and presets; gives ``HardwareProfile`` and ``ModelProfile`` labelled ``estimated``.  Knows
nothing of torch, plans or costs.
"""

from .cards import CARDS, model_spec
from .cluster import ClusterShape, cluster
from .config import spec_of_config
from .devices import DEVICES
from .known import adapted_spec
from .profile import estimate_model

__all__ = [
    "CARDS",
    "DEVICES",
    "ClusterShape",
    "adapted_spec",
    "cluster",
    "estimate_model",
    "model_spec",
    "spec_of_config",
]
