"""Words and pictures of what was decided.

Takes SearchResults and predicted plans; gives text for people and plain objects for programs.  Knows nothing of
torch, of how results are printed or of how plans run.
"""

from .diff import diff_plans
from .summary import summary
from .timeline import draw_svg, draw_text
from .why import explain, explain_prediction

__all__ = ["diff_plans", "draw_svg", "draw_text", "explain", "explain_prediction", "summary"]
