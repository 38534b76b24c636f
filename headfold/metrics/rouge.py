"""ROUGE of the outputs of an encoder-decoder, by the rouge-score package with its defaults."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ..core.errors import UserError
from .bootstrap import Units, mean_of

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
"""Single words, pairs of words, and the longest common subsequence of the whole text and line by line."""


def require() -> Any:
    """Return rouge-score's scorer of all of `NAMES`.

    Raises:
        UserError: it is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError("ROUGE needs rouge-score; pip install 'headfold[summaries]'") from error
    return RougeScorer(list(NAMES))


def scores(hypotheses: Sequence[str], targets: Sequence[str]) -> dict[str, Float[np.ndarray, " item"]]:
    """Return F1 of every item in percent, by name (Lin 2004): 2 P R / (P + R) of precision and recall, with one reference per item.

    There is no stemming. Words are runs of the letters a to z and of digits, in lower case; all other characters separate words,
    so texts without such letters are refused instead of scored 0. Sentences of rougeLsum end at line ends.

    Raises:
        UserError: rouge-score is not installed, or no target contains such a word.
    """
    scorer = require()
    if not any(character.isascii() and character.isalnum() for target in targets for character in target):
        raise UserError("ROUGE: expected words of the letters a to z, found none in any target; use --metric bleu")
    pairs = zip(hypotheses, targets, strict=True)
    rows = [scorer.score(target, hypothesis) for hypothesis, target in pairs]
    return {name: np.array([100 * row[name].fmeasure for row in rows]) for name in NAMES}


def units(hypotheses: Sequence[str], targets: Sequence[str]) -> list[Units]:
    """Return all of `NAMES` in percent, as means over the items.

    Raises:
        UserError: as `scores`.
    """
    return [mean_of(name, "pairs", values) for name, values in scores(hypotheses, targets).items()]
