"""Words and pictures of what was decided.

Takes SearchResults and predicted plans; gives text for people.  Knows nothing of torch, of how results are
printed or of how plans run.
"""

from .timeline import draw_svg, draw_text
from .why import explain, explain_prediction

__all__ = ["draw_svg", "draw_text", "explain", "explain_prediction"]
