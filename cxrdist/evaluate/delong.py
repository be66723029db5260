"""Comparison of two AUROCs on the same images (DeLong, DeLong & Clarke-Pearson 1988).

The test treats images as independent, even those of one patient.
"""

import math
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from cxrdist.bootstrap import LEVEL, Limits
from cxrdist.documents import Real, Share


class DeLong(TypedDict):
    """The difference between two AUROCs, the second minus the first."""

    difference: Real
    interval: Limits
    """At the same level as the other intervals, from the normal distribution."""
    p_value: Share
    """Two-sided."""


def placements(
    scores: NDArray[np.float64], truth: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the structural components of AUROCs from midranks (Sun & Xu 2014, algorithm 2).

    They (DeLong et al. 1988, section 3) follow from the ranks of an image among all images and
    among those with the same truth. This needs N log N steps, where comparing all pairs of images
    would need N squared. Ties count one half.

    Args:
        scores: scores of K models, float64 [K, N].
        truth: bool [N], with both values.

    Returns:
        The share of negatives below each positive, float64 [K, positives], and of positives above
        each negative, float64 [K, negatives]; the AUROC is the mean of either.
    """
    from scipy.stats import rankdata

    positives, negatives = scores[:, truth], scores[:, ~truth]
    num_positives, num_negatives = positives.shape[1], negatives.shape[1]
    ranks = rankdata(np.hstack([positives, negatives]), axis=1)
    above = (ranks[:, :num_positives] - rankdata(positives, axis=1)) / num_negatives
    below = 1 - (ranks[:, num_positives:] - rankdata(negatives, axis=1)) / num_positives
    return above, below


def compare_aurocs(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> DeLong | None:
    """Test whether two models, with scores float64 [2, N], rank N images equally well.

    Returns:
        The difference; None with fewer than two positives or negatives, which have no variance.
    """
    from scipy.stats import norm

    if min(truth.sum(), (~truth).sum()) < 2:
        return None
    above, below = placements(scores, truth)
    aurocs = above.mean(axis=1)
    spread = np.cov(above) / above.shape[1] + np.cov(below) / below.shape[1]
    difference = float(aurocs[1] - aurocs[0])
    error = math.sqrt(max(0.0, float(spread[0, 0] + spread[1, 1] - 2 * spread[0, 1])))
    reach = float(norm.ppf((1 + LEVEL) / 2)) * error
    # Without variance both models rank alike, and the difference is 0 up to rounding.
    p_value = 2 * float(norm.sf(abs(difference) / error)) if error > 1e-12 else 1.0
    return {
        "difference": round(difference, 6),
        "interval": [round(difference - reach, 6), round(difference + reach, 6)],
        "p_value": p_value,
    }
