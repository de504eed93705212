"""Tiny models of every family, with weights that hide nothing.

Takes a family's name and overrides in Hugging Face's own words; gives configurations and float32 models that train in
milliseconds.  Knows nothing of plans.
"""

from .families import ENCODERS, FAMILIES, tiny_config
from .variants import ADAPTED, SAMPLED, VARIANTS, Variant
from .weights import draw_weights, tiny_model

__all__ = [
    "ADAPTED",
    "ENCODERS",
    "FAMILIES",
    "SAMPLED",
    "VARIANTS",
    "Variant",
    "draw_weights",
    "tiny_config",
    "tiny_model",
]
