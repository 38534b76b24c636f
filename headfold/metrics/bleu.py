"""BLEU of the outputs of an encoder-decoder, by sacrebleu with its defaults, as sums over sentences."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ..core.errors import UserError
from .bootstrap import Units

ORDERS = 4


def require() -> Any:
    """Return sacrebleu's class.

    Raises:
        UserError: it is not installed.
    """
    try:
        from sacrebleu import BLEU
    except ImportError as error:
        raise UserError("BLEU needs sacrebleu; pip install 'headfold[translation]'") from error
    return BLEU


def units(hypotheses: Sequence[str], targets: Sequence[str]) -> list[Units]:
    """Return corpus BLEU in percent (Papineni et al. 2002; 13a tokenisation, exponential smoothing), with one reference per item.

    The statistics of an item are the lengths of output and reference, then the matching and all n-grams of every order. Corpus
    BLEU depends on their sums only, so it can be computed for every resample.

    Raises:
        UserError: sacrebleu is not installed.
    """
    scorer = require()(effective_order=True)  # said for single sentences, of which the counts alone are read
    pairs = zip(hypotheses, targets, strict=True)
    scores = [scorer.sentence_score(hypothesis, [target]) for hypothesis, target in pairs]
    rows = [[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in scores]
    return [Units(metric="bleu", unit="pairs", sums=np.array(rows, dtype=np.float64), value=_of_sums)]


def corpus_bleu(hypotheses: Sequence[str], targets: Sequence[str]) -> float:
    """Return BLEU in percent of all outputs together.

    Raises:
        UserError: sacrebleu is not installed.
    """
    return units(hypotheses, targets)[0].total


def _of_sums(sums: Float[np.ndarray, "... statistic"]) -> Float[np.ndarray, "..."]:
    compute = require().compute_bleu
    rows = sums.reshape(-1, 2 + 2 * ORDERS).astype(int).tolist()
    scores = [compute(row[2 : 2 + ORDERS], row[2 + ORDERS :], *row[:2], smooth_method="exp").score for row in rows]
    return np.array(scores).reshape(sums.shape[:-1])
