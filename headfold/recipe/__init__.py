"""Floor 8: whole jobs, one sentence each. What the command line says, the API says in the same words."""

from ..evaluate.perplexity import Evaluation
from .deciding import plan
from .evaluating import evaluate
from .folding import FoldResult, fold
from .inspecting import Inspection, SiteInspection, inspect
from .measuring import DEFAULT_CALIBRATION, DEFAULT_TOKENS, CalibrationResult, calibrate
from .source import Progress

__all__ = [
    "DEFAULT_CALIBRATION",
    "DEFAULT_TOKENS",
    "CalibrationResult",
    "Evaluation",
    "FoldResult",
    "Inspection",
    "Progress",
    "SiteInspection",
    "calibrate",
    "evaluate",
    "fold",
    "inspect",
    "plan",
]
