"""Operating points: thresholds chosen on the validation split, and their rates on any split."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from cxrdist.bootstrap import Limits, Replicates, Values
from cxrdist.data.labels import NEGATIVE, POSITIVE
from cxrdist.documents import Real, Sha256, Share, Text
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.scored import Scored
from cxrdist.info import Count
from cxrdist.intervals import of_share
from cxrdist.model.description import Calibration
from cxrdist.model.prediction import call
from cxrdist.terminal import percentage, table

YOUDEN = "youden"
CELLS = ("true_positives", "false_negatives", "false_positives", "true_negatives")
MEASURES = ("sensitivity", "specificity", "ppv", "npv")

Interval = Limits | None


@dataclass(frozen=True)
class Rule:
    """How a threshold is chosen.

    ``youden`` maximises sensitivity + specificity (Youden 1950). ``sensitivity`` and
    ``specificity`` reach at least the given value, then maximise the other one. Of equally good
    thresholds the largest is taken.

    Attributes:
        measure: youden, sensitivity or specificity.
        least: the value to reach, above 0 and at most 1; None for youden.
    """

    measure: str
    least: float | None

    def __str__(self) -> str:
        """Return the text that `read_rule` reads."""
        if self.least is None:
            return self.measure
        # Not in the form 1e-05, which `read_rule` rejects, nor rounded.
        return f"{self.measure}={np.format_float_positional(self.least, trim='-')}"


def read_rule(text: str) -> Rule:
    """Read a rule such as ``youden`` or ``sensitivity=0.95``.

    Raises:
        CxrdistError: the text is not a valid rule.
    """
    if text == YOUDEN:
        return Rule(text, None)
    match = re.fullmatch(r"(sensitivity|specificity)=(\d{0,3}\.?\d{1,9})", text)
    if not match or not 0 < float(match[2]) <= 1:
        raise CxrdistError(
            f"--operating-point {text!r:.60}: expected youden, sensitivity=0.95 or "
            "specificity=0.95, with a number above 0 and at most 1"
        )
    return Rule(match[1], float(match[2]))


def choose_threshold(logits: NDArray[np.float64], truth: NDArray[np.bool_], rule: Rule) -> float:
    """Choose the logit at or above which a class is called; infinity if never calling is best.

    Logits and truth are [n]; the truth has both values.
    """
    from sklearn.metrics import roc_curve  # a third of a second to import

    # By default scikit-learn drops points on straight lines, where a wanted rate may be reached.
    false_rate, true_rate, thresholds = roc_curve(truth, logits, drop_intermediate=False)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    # Whole numbers, because equal rates may differ in their last bit.
    hits = np.rint(true_rate * positives).astype(np.int64)
    spared = negatives - np.rint(false_rate * negatives).astype(np.int64)
    # Thresholds fall from infinity: argmax finds the first, so the largest, of equally good ones.
    if rule.least is None:
        # Sensitivity + specificity, times positives * negatives.
        return float(thresholds[np.argmax(hits * negatives + spared * positives)])
    if rule.measure == "sensitivity":
        return float(thresholds[np.argmax(hits / positives >= rule.least)])
    # Hits never fall along the curve, so the last point that is allowed has the most.
    allowed = np.flatnonzero(spared / negatives >= rule.least)
    return float(thresholds[np.argmax(hits == hits[allowed[-1]])])


class PredictiveValues(TypedDict):
    """Positive and negative predictive value; None where undefined."""

    ppv: Share | None
    ppv_interval: Interval
    npv: Share | None
    npv_interval: Interval


class OperatingPoint(PredictiveValues):
    """Counts and rates at the threshold of a class, over the images for which it is known."""

    threshold: Real
    """A logit before calibration."""
    probability: Share
    """Sigmoid of the threshold, comparable with prob_CLASS."""
    true_positives: Count
    false_negatives: Count
    false_positives: Count
    true_negatives: Count
    sensitivity: Share | None
    sensitivity_interval: Interval
    specificity: Share | None
    specificity_interval: Interval
    at_prevalence: NotRequired[PredictiveValues]
    """At another prevalence of the class (Bayes' rule)."""


class ChosenOn(TypedDict):
    """The validation split that thresholds and temperatures were chosen on."""

    index_sha256: Sha256
    images: Count
    patients: Count
    fewest: Count


class OperatingPoints(TypedDict):
    """The member ``operating_points`` of metrics.json."""

    rule: Text
    chosen_on: ChosenOn
    prevalence: Share | None
    """The value of --prevalence, for at_prevalence."""
    classes: dict[str, OperatingPoint]
    reasons: dict[str, Text]
    """Why a class has no operating point, by class."""


def operating_points(
    scored: Scored, replicates: Replicates, calibration: Calibration, prevalence: float | None
) -> OperatingPoints:
    """Apply the thresholds of a model to images.

    Predictive values are for the images, and for `prevalence` if given: the share of patients with
    each class where the model will be used.
    """
    thresholds = calibration.thresholds
    cells = {
        name: _cells_of(scored, name, thresholds[name])
        for name in scored.classes
        if name in thresholds
    }
    drawn: list[NDArray[np.float64]] = []
    if cells:  # in one matrix product, which is much faster than one product per class
        sums = replicates.sums(np.hstack([*cells.values()]).astype(np.float64))
        drawn = np.split(sums, len(cells), axis=1)
    return {
        "rule": calibration.rule,
        "chosen_on": chosen_on(calibration),
        "prevalence": prevalence,
        "classes": {
            name: _measure(masks, thresholds[name], replicates, counts, prevalence)
            for (name, masks), counts in zip(cells.items(), drawn, strict=True)
        },
        "reasons": {
            name: calibration.reasons.get(name, "it has no threshold")
            for name in scored.classes
            if name not in thresholds
        },
    }


def chosen_on(calibration: Calibration) -> ChosenOn:
    """Return on which images a calibration was chosen."""
    return {
        "index_sha256": calibration.index_sha256,
        "images": calibration.images,
        "patients": calibration.patients,
        "fewest": calibration.fewest,
    }


def _cells_of(scored: Scored, name: str, threshold: float) -> NDArray[np.bool_]:
    """Return a mask for each of `CELLS`, bool [N, 4]; all False where the class is unknown."""
    column = scored.classes.index(name)
    called = call(scored.logits[:, column], threshold)
    has, lacks = (scored.targets[:, column] == code for code in (POSITIVE, NEGATIVE))
    return np.stack([has & called, has & ~called, lacks & called, lacks & ~called], axis=1)


def _measure(
    cells: NDArray[np.bool_],
    threshold: float,
    replicates: Replicates,
    drawn: NDArray[np.float64],
    prevalence: float | None,
) -> OperatingPoint:
    """Count the cells of a class, masks [N, 4], and compute its rates with intervals.

    The counts of the cells in each replicate are `drawn`, float [replicates, 4].
    """
    hits, missed, false_alarms, spared = cells.T
    has, lacks = hits | missed, false_alarms | spared
    counts = cells.sum(axis=0, keepdims=True)
    rates, replicated = _rates(counts.astype(np.float64)), _rates(drawn)
    wholes = dict(zip(MEASURES, (has, lacks, hits | false_alarms, missed | spared), strict=True))
    point: dict[str, object] = {
        "threshold": threshold,
        "probability": round(float(expit(threshold)), 6),
        **dict(zip(CELLS, counts[0].tolist(), strict=True)),
    }
    limits: dict[str, Limits | None] = {}
    for name, whole in wholes.items():
        point[name] = _digits(rates[name][0])
        # `hits | spared` are the correct calls: within `has` the hits, within `lacks` the spared.
        limits[name] = of_share(replicates, hits | spared, whole, replicated[name])
        point[f"{name}_interval"] = limits[name]
    if prevalence is not None:
        point["at_prevalence"] = _at_prevalence(limits, rates, prevalence)
    return cast(OperatingPoint, point)


def _rates(counts: NDArray[np.float64]) -> dict[str, Values]:
    """Compute the rates from counts of `CELLS`, float [n, 4]; NaN where undefined."""
    hits, missed, false_alarms, spared = counts.T
    with np.errstate(invalid="ignore"):
        return {
            "sensitivity": hits / (hits + missed),
            "specificity": spared / (spared + false_alarms),
            "ppv": hits / (hits + false_alarms),
            "npv": spared / (spared + missed),
        }


def _at_prevalence(
    intervals: Mapping[str, Limits | None], rates: Mapping[str, Values], prevalence: float
) -> PredictiveValues:
    """Compute predictive values at a prevalence with their intervals.

    Their log odds are a sum of a function of the sensitivity and one of the specificity, so their
    limits follow from those of the two (`_parts`; Zou & Donner 2008, Statistics in Medicine 27,
    1693). For a value of exactly 0 or 1 they are the values at both lower and both upper limits.
    """
    if intervals["sensitivity"] is None or intervals["specificity"] is None:
        return {"ppv": None, "ppv_interval": None, "npv": None, "npv_interval": None}
    limits = {name: np.array(intervals[name]) for name in ("sensitivity", "specificity")}
    values, extremes = (_predictive(given, prevalence) for given in (rates, limits))
    parts, ends = _parts(rates), _parts(limits)
    written: dict[str, float | Limits | None] = {}
    for name, (value,) in values.items():
        within = None if np.isnan(value) else extremes[name]
        if 0 < value < 1:
            reach = np.hypot(*(ends[name] - parts[name]))
            within = expit(logit(value) + reach * np.array([-1, 1]))
        written[name] = _digits(value)
        written[f"{name}_interval"] = None if within is None else np.round(within, 6).tolist()
    return cast(PredictiveValues, written)


def _parts(rates: Mapping[str, Values]) -> dict[str, NDArray[np.float64]]:
    """Return the summands of the log odds of predictive values without the prevalence, [2, n]."""
    sensitivity, specificity = rates["sensitivity"], rates["specificity"]
    with np.errstate(divide="ignore"):
        return {
            "ppv": np.stack([np.log(sensitivity), -np.log1p(-specificity)]),
            "npv": np.stack([np.log(specificity), -np.log1p(-sensitivity)]),
        }


def _predictive(rates: Mapping[str, Values], prevalence: float) -> dict[str, Values]:
    """Compute predictive values at a prevalence, by Bayes' rule (Altman & Bland 1994)."""
    sensitivity, specificity = rates["sensitivity"], rates["specificity"]
    hits, missed = sensitivity * prevalence, (1 - sensitivity) * prevalence
    spared, false_alarms = specificity * (1 - prevalence), (1 - specificity) * (1 - prevalence)
    computed = _rates(np.stack([hits, missed, false_alarms, spared], 1))
    return {name: computed[name] for name in ("ppv", "npv")}


def _digits(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)


def operating_table(points: OperatingPoints) -> str:
    """Format the operating points with 95 % intervals for the terminal, in percent."""
    rows = []
    for name, point in points["classes"].items():
        rows.append([name, f"{point['probability']:.3f}", *_cells(point, MEASURES)])
        if "at_prevalence" in point:
            cells = _cells(point["at_prevalence"], ("ppv", "npv"))
            rows.append([f"at {points['prevalence']:g}", "", "", "", *cells])
    headers = ("Class", "From", "Sensitivity, %", "Specificity, %", "PPV, %", "NPV, %")
    return table(rows, headers)


def _cells(values: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    cells = []
    for name in names:
        value, within = values[name], values[f"{name}_interval"]
        shown = "-" if value is None else percentage(value)
        cells.append(f"{shown} ({'-'.join(map(percentage, within))})" if within else shown)
    return cells
