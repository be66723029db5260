"""Comparison of two AUROCs on the same images (DeLong, DeLong & Clarke-Pearson 1988).

The test treats images as independent, even those of one patient.
"""

import math
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from cxrdist.bootstrap import LEVEL, Limits
from cxrdist.documents import Real
from cxrdist.evaluate.metrics import Share


class DeLong(TypedDict):
    """The difference between two AUROCs, the second minus the first."""

    difference: Real
    interval: Limits
    """At the same level as the other intervals, from the normal distribution."""
    p_value: Share
    """Two-sided."""


def covariance(
    scores: NDArray[np.float64], truth: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute AUROCs and their covariance from midranks (Sun & Xu 2014, algorithm 2).

    The structural components of DeLong et al. (1988, section 3) follow from the ranks of an image
    among all images and among those with the same truth. This needs N log N steps, where comparing
    all pairs of images would need N squared.

    Args:
        scores: scores of K models, float64 [K, N].
        truth: bool [N], with at least two images of each value.

    Returns:
        The AUROCs, float64 [K], and their covariance, float64 [K, K].
    """
    from scipy.stats import rankdata

    positives, negatives = scores[:, truth], scores[:, ~truth]
    num_positives, num_negatives = positives.shape[1], negatives.shape[1]
    ranks = rankdata(np.hstack([positives, negatives]), axis=1)
    above = (ranks[:, :num_positives] - rankdata(positives, axis=1)) / num_negatives
    below = 1 - (ranks[:, num_positives:] - rankdata(negatives, axis=1)) / num_positives
    spread = np.cov(above) / num_positives + np.cov(below) / num_negatives
    return above.mean(axis=1), np.atleast_2d(spread)


def compare_aurocs(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> DeLong | None:
    """Test whether two models rank the same images equally well.

    Args:
        scores: scores of both models, float64 [2, N].
        truth: bool [N].

    Returns:
        The difference; None with fewer than two positives or negatives, which have no variance.
    """
    from scipy.stats import norm

    if min(truth.sum(), (~truth).sum()) < 2:
        return None
    aurocs, spread = covariance(scores, truth)
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
