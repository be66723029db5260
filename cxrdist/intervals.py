"""Confidence intervals of figures between 0 and 1, and of their means, from patient replicates.

Percentiles of replicates are too narrow with few patients: for 60 patients with 1 to 6 images that
correlate by 0.5, 95 % intervals of sensitivity contain the truth in 90 of 100 cases. Instead, the
limits are computed on the logit scale, which keeps them in 0..1 and makes figures near 1 less
skewed (Pepe 2003, section 5.2). Their distance from the figure is the standard error of the
replicates times sqrt(n / (n - 1)) times the quantile of t with n - 1 degrees of freedom, where n is
the number of patients behind the figure (Hesterberg 2015, The American Statistician 69, section
3.2).

As patients are drawn within classes, an interval holds for sets with the same share of each class.
Figures that depend on this share vary more between sets in which it varies: for 60 patients, 95 %
intervals of predictive values then contain the truth in 87 of 100 cases, those of the net benefit
in 58 (at low thresholds) to 96.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np
import scipy  # loads submodules on first use; ranks that train need none of them
from numpy.typing import NDArray

from cxrdist.bootstrap import ALIKE, LEVEL, SEED, Limits, Replicates, Values
from cxrdist.documents import Text
from cxrdist.info import Count

METHOD = (
    "bootstrap over patients, drawn within the rarest class of each, so that intervals are for "
    "the share of each class in these images; limits on the logit scale, from the standard error "
    "of the replicates times sqrt(n / (n - 1)) and t with n - 1 degrees of freedom, n the "
    "patients that the figure rests on, of AUROC those of its smaller side (Hesterberg 2015). A "
    "figure of exactly 0 or 1, whose replicates are all equal: Wilson (1927) of n patients; "
    "AUROC: Newcombe (2006, method 5); average precision: Wilson of the patients with the class "
    "(Boyd et al. 2013). Without bounds: ratios of means on the logarithmic scale, differences "
    "and net benefits on their own. Calibration errors: percentiles of the replicates around the "
    "error, and down to the least error that chance adds to. Means: the intervals of the classes "
    "and the correlation of their replicates (Zou 2007). Predictive values at another prevalence: "
    "the intervals of sensitivity and specificity (Zou & Donner 2008)"
)
QUANTILE = (1 + LEVEL) / 2


class Intervals(TypedDict):
    """The method of all intervals of a document."""

    method: Text
    level: float
    replicates: Count
    seed: int
    patients: Count
    unit: Text
    """patient, or image where no patient has two images."""


def describe(replicates: Replicates) -> Intervals:
    """Return the description of the intervals for a document."""
    patients = replicates.patients(np.ones(len(replicates.patient), bool))
    return {
        "method": METHOD,
        "level": LEVEL,
        "replicates": len(replicates.draws),
        "seed": SEED,
        "patients": patients,
        "unit": "image" if patients == len(replicates.patient) else "patient",
    }


def bounded(
    estimate: float, values: Values, patients: int, edge: Callable[[], Limits] | None = None
) -> Limits:
    """Return the interval of a figure from 0 to 1, given its values in the replicates.

    ``patients`` is the number of patients behind the figure, such as those with the class for its
    sensitivity. ``edge`` returns the interval of a figure of 0 or 1; if None, Wilson's.
    """
    # A perfect AUROC of torchmetrics may be 1 - 1e-16, for which the delta method gives 0 to 1.
    if abs(estimate - round(estimate)) < ALIKE:
        return edge() if edge else wilson(round(estimate) * patients, patients)
    half, product = _half(values, patients), estimate * (1 - estimate)
    if half is None:  # use the binomial error, with one draw per patient
        half = scipy.stats.norm.ppf(QUANTILE) * np.sqrt(product / max(patients, 1))
    half /= product  # delta method: the derivative of logit(p) is 1 / (p (1 - p))
    middle = scipy.special.logit(estimate)
    return _limits(scipy.special.expit(middle - half), scipy.special.expit(middle + half))


def positive(estimate: float, values: Values, patients: int) -> Limits | None:
    """Return the interval of a figure above 0 without an upper bound, such as a ratio of two means.

    Like `bounded`, but on the logarithmic scale. None without spread, or for a figure of 0.
    """
    half = _half(np.log(values[values > 0]), patients)
    if estimate <= 0 or half is None:
        return None
    return _limits(estimate * np.exp(-half), estimate * np.exp(half))


def unbounded(estimate: float, values: Values, patients: int) -> Limits | None:
    """Return the interval of a difference or another figure without bounds, on its own scale.

    Like `bounded`, but None without spread: replicates that are all equal do not show how certain
    the figure is.
    """
    half = _half(values, patients)
    return None if half is None else _limits(estimate - half, estimate + half)


def _half(values: Values, patients: int) -> float | None:
    """Return half the width of an interval by t; None for one patient or equal replicates."""
    finite = values[np.isfinite(values)]
    spread = float(finite.std(ddof=1)) if len(finite) > 1 else 0.0
    if patients < 2 or spread < ALIKE:
        return None
    spread *= np.sqrt(patients / (patients - 1))
    return float(scipy.stats.t.ppf(QUANTILE, patients - 1) * spread)


def wilson(part: int, whole: int) -> Limits:
    """Return the interval of a share of independent draws (Wilson 1927), by SciPy."""
    low, high = scipy.stats.binomtest(part, whole).proportion_ci(LEVEL, method="wilson")
    return _limits(low, high)


def newcombe(auroc: float, positives: int, negatives: int) -> Limits:
    """Return the interval of an AUROC of 0 or 1 for independent images.

    Method 5 of Newcombe (2006, Statistics in Medicine 25, 559-573): the distance of the limit from
    the AUROC is z times the standard error at the limit (Hanley & McNeil 1982, with the mean of the
    two numbers of images).
    """
    half = (positives + negatives) / 2 - 1
    z = scipy.stats.norm.ppf(QUANTILE)

    def excess(limit: float) -> float:
        shape = 1 + half * (1 - limit) / (2 - limit) + half * limit / (1 + limit)
        return float((1 - limit) - z**2 * limit * shape / (positives * negatives))

    # The excess is 1 at 0 and below 0 at 1, so that brentq finds a root.
    low = float(scipy.optimize.brentq(excess, 0, 1))
    return _limits(low, 1) if auroc == 1 else _limits(0, 1 - low)


def of_share(
    replicates: Replicates,
    part: NDArray[np.bool_],
    whole: NDArray[np.bool_],
    values: Values | None = None,
) -> Limits | None:
    """Return the interval of the share of images in `part` among those in `whole`, [N] each.

    Return None if `whole` is empty. The values of the replicates are computed if not given.
    """
    if not whole.any():
        return None
    shares = replicates.share(part, whole) if values is None else values
    return bounded(float(part[whole].mean()), shares, replicates.patients(whole))


def of_values(
    replicates: Replicates, values: NDArray[np.float64], known: NDArray[np.bool_]
) -> Limits:
    """Return the interval of the mean of values 0..1 [N] over some of the images, a mask [N]."""
    columns = np.column_stack([np.where(known, values, 0), known]).astype(np.float64)
    sums = replicates.sums(columns)
    with np.errstate(invalid="ignore"):
        means = sums[:, 0] / sums[:, 1]
    return bounded(float(values[known].mean()), means, replicates.patients(known))


def of_auroc(
    replicates: Replicates, auroc: float, values: Values, truth: NDArray[np.bool_]
) -> Limits:
    """Return the interval of an AUROC from its replicates and the truth [N]."""
    sides = replicates.patients(truth), replicates.patients(~truth)
    return bounded(auroc, values, min(sides), lambda: newcombe(round(auroc), *sides))


def of_mean(
    estimates: Sequence[float], limits: Sequence[Limits], values: NDArray[np.float64]
) -> Limits:
    """Return the interval of the mean of C figures, from their intervals and replicates.

    The distances of the limits are added like standard errors, with the correlations of the
    replicates [C, replicates] (Zou 2007, Psychological Methods 12, 399-413). So the result is
    wider for a class with few patients, and for one whose replicates are all equal.
    """
    # corrcoef would give NaN for a figure whose replicates are all equal: it counts as independent.
    correlation = np.eye(len(estimates))
    have_all = values[:, np.isfinite(values).all(axis=0)]
    varies = np.ptp(have_all, axis=1) > ALIKE if have_all.size else np.zeros(len(values), bool)
    if varies.any():
        correlation[np.ix_(varies, varies)] = np.corrcoef(have_all[varies])
    middle = np.mean(estimates)
    low, high = (np.subtract(side, estimates) for side in zip(*limits, strict=True))
    # All gaps to the lower limits are negative, which the square cancels.
    down, up = (np.sqrt(max(0.0, gap @ correlation @ gap)) / len(gap) for gap in (low, high))
    return _limits(max(0.0, middle - down), min(1.0, middle + up))


def _limits(low: Any, high: Any) -> Limits:
    return [round(float(low), 6), round(float(high), 6)]
