"""Operating points: thresholds chosen on the validation split, and what they do on another one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from cxrdist.bootstrap import Replicates, Values, interval
from cxrdist.data.labels import POSITIVE
from cxrdist.documents import Between, Real, Sha256, Text
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.scored import Scored
from cxrdist.info import Count
from cxrdist.model.description import Calibration
from cxrdist.terminal import table

YOUDEN = "youden"
MEASURES = ("sensitivity", "specificity", "ppv", "npv")

Share = Annotated[float, Between(0, 1)]
Interval = list[Share] | None


@dataclass(frozen=True)
class Rule:
    """How a threshold is chosen.

    ``youden``: the largest sensitivity + specificity (Youden 1950). ``sensitivity`` and
    ``specificity``: at least that much of it, and then as much as possible of the other one. Of
    equally good thresholds it is the largest.

    Attributes:
        measure: youden, sensitivity or specificity.
        least: of a sensitivity or specificity, above 0 and at most 1; None for youden.
    """

    measure: str
    least: float | None

    def __str__(self) -> str:
        """The text that `read_rule` reads."""
        return self.measure if self.least is None else f"{self.measure}={self.least:g}"


def read_rule(text: str) -> Rule:
    """Read a rule such as ``youden`` or ``sensitivity=0.95``.

    Raises:
        CxrdistError: it is something else.
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
    """Choose the logit from which on a class is called; infinity where none is better than never.

    Args:
        logits: float [n], of the class.
        truth: bool [n], with both values.
        rule: how.
    """
    from sklearn.metrics import roc_curve  # a third of a second to import

    false_rate, true_rate, thresholds = roc_curve(truth, logits, drop_intermediate=False)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    # Whole numbers, since rates that are equal may differ in their last bit.
    hits = np.rint(true_rate * positives).astype(np.int64)
    spared = negatives - np.rint(false_rate * negatives).astype(np.int64)
    if rule.least is None:
        return float(thresholds[np.argmax(hits * negatives + spared * positives)])
    if rule.measure == "sensitivity":
        return float(thresholds[np.argmax(hits / positives >= rule.least)])
    allowed = np.flatnonzero(spared / negatives >= rule.least)
    return float(thresholds[np.argmax(hits == hits[allowed[-1]])])


def call(logits: NDArray[Any], threshold: float) -> NDArray[np.bool_]:
    """Whether each of some logits, of any shape, calls its class.

    Compared are float32, as the network gives them: nine digits of a file are not the same double.
    """
    return logits.astype(np.float32) >= np.float32(threshold)


def called_columns(
    logits: NDArray[Any], classes: Sequence[str], calibration: Calibration | None
) -> dict[str, NDArray[np.bool_]]:
    """Give the columns called_CLASS, bool [N] each, of the classes that have a threshold."""
    thresholds = calibration.thresholds if calibration else {}
    return {
        f"called_{name}": call(logits[:, i], thresholds[name])
        for i, name in enumerate(classes)
        if name in thresholds
    }


class AtPrevalence(TypedDict):
    """Predictive values where another share of patients has the class (Bayes' rule)."""

    ppv: Share | None
    ppv_interval: Interval
    npv: Share | None
    npv_interval: Interval


class OperatingPoint(TypedDict):
    """What the threshold of a class does, on the images of which it is known."""

    threshold: Real
    """A logit, not calibrated."""
    probability: Share
    """Its sigmoid, in the terms of prob_CLASS."""
    true_positives: Count
    false_negatives: Count
    false_positives: Count
    true_negatives: Count
    sensitivity: Share | None
    sensitivity_interval: Interval
    specificity: Share | None
    specificity_interval: Interval
    ppv: Share | None
    ppv_interval: Interval
    npv: Share | None
    npv_interval: Interval
    at_prevalence: NotRequired[AtPrevalence]


class ChosenOn(TypedDict):
    """The validation split that thresholds and temperatures were chosen on."""

    index_sha256: Sha256
    images: Count
    patients: Count
    fewest: Count


class OperatingPoints(TypedDict):
    """The part ``operating_points`` of metrics.json."""

    rule: Text
    chosen_on: ChosenOn
    prevalence: Share | None
    """The reader's, to which at_prevalence belongs."""
    classes: dict[str, OperatingPoint]
    reasons: dict[str, Text]
    """Of each class without an operating point, why."""


def operating_points(
    scored: Scored, replicates: Replicates, calibration: Calibration, prevalence: float | None
) -> OperatingPoints:
    """Apply the thresholds of a model to some images.

    Args:
        scored: the images.
        replicates: of them.
        calibration: of the model.
        prevalence: share of patients with each class, for predictive values elsewhere.
    """
    thresholds = calibration.thresholds
    names = [name for name in scored.classes if name in thresholds]
    return {
        "rule": calibration.rule,
        "chosen_on": chosen_on(calibration),
        "prevalence": prevalence,
        "classes": {
            name: _operating_point(scored, replicates, name, thresholds[name], prevalence)
            for name in names
        },
        "reasons": {
            name: calibration.reasons.get(name, "it has no threshold")
            for name in scored.classes
            if name not in thresholds
        },
    }


def chosen_on(calibration: Calibration) -> ChosenOn:
    """Say on which images a calibration was chosen."""
    return {
        "index_sha256": calibration.index_sha256,
        "images": calibration.images,
        "patients": calibration.patients,
        "fewest": calibration.fewest,
    }


def refuse_bad_prevalence(prevalence: float | None) -> None:
    """Make sure that a prevalence is a share.

    Raises:
        CxrdistError: it is not.
    """
    if prevalence is not None and not 0 < prevalence < 1:
        raise CxrdistError(
            f"--prevalence {prevalence:g}: expected a share between 0 and 1, such as 0.05"
        )


def _operating_point(
    scored: Scored, replicates: Replicates, name: str, threshold: float, prevalence: float | None
) -> OperatingPoint:
    column = scored.classes.index(name)
    known, truth = scored.targets[:, column] >= 0, scored.targets[:, column] == POSITIVE
    called = call(scored.logits[:, column], threshold)
    cells = np.stack(
        [truth & called, truth & ~called, known & ~truth & called, known & ~truth & ~called], 1
    )
    counts = np.vstack([cells.sum(axis=0), replicates.sums(cells.astype(np.float64))])
    rates = _rates(counts)
    figures: dict[str, Any] = _with_intervals(rates)
    if prevalence is not None:
        elsewhere = _predictive(rates["sensitivity"], rates["specificity"], prevalence)
        figures["at_prevalence"] = _with_intervals(elsewhere)
    return {
        "threshold": threshold,
        "probability": round(float(expit(threshold)), 6),
        "true_positives": int(counts[0, 0]),
        "false_negatives": int(counts[0, 1]),
        "false_positives": int(counts[0, 2]),
        "true_negatives": int(counts[0, 3]),
        **figures,  # type: ignore[typeddict-item]
    }


def _rates(counts: NDArray[np.float64]) -> dict[str, Values]:
    """Compute rates of true and false positives and negatives, float [n, 4]; NaN of nothing."""
    hits, missed, false_alarms, spared = counts.T
    with np.errstate(invalid="ignore"):
        return {
            "sensitivity": hits / (hits + missed),
            "specificity": spared / (spared + false_alarms),
            "ppv": hits / (hits + false_alarms),
            "npv": spared / (spared + missed),
        }


def _predictive(sensitivity: Values, specificity: Values, prevalence: float) -> dict[str, Values]:
    """Compute predictive values at a prevalence, by Bayes' rule (Altman & Bland 1994)."""
    hits, missed = sensitivity * prevalence, (1 - sensitivity) * prevalence
    spared, false_alarms = specificity * (1 - prevalence), (1 - specificity) * (1 - prevalence)
    rates = _rates(np.stack([hits, missed, false_alarms, spared], 1))
    return {name: rates[name] for name in ("ppv", "npv")}


def _with_intervals(figures: Mapping[str, Values]) -> dict[str, Any]:
    """Write figures, whose first value is that of the images and the others of the replicates."""
    written: dict[str, Any] = {}
    for name, (value, *_) in figures.items():
        written[name] = None if np.isnan(value) else round(float(value), 6)
        written[f"{name}_interval"] = interval(figures[name][1:])
    return written


def operating_table(found: OperatingPoints) -> str:
    """Lay the operating points out for the terminal, in percent, with their 95 % intervals."""
    rows = []
    for name, point in found["classes"].items():
        rows.append([name, f"{point['probability']:.3f}", *_cells(point, MEASURES)])
        if "at_prevalence" in point:
            cells = _cells(point["at_prevalence"], ("ppv", "npv"))
            rows.append([f"- prevalence {found['prevalence']:g}", "", "", "", *cells])
    headers = ("Class", "From", "Sensitivity, %", "Specificity, %", "PPV, %", "NPV, %")
    return table(rows, headers)


def _cells(values: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    cells = []
    for name in names:
        value, within = values[name], values[f"{name}_interval"]
        shown = "-" if value is None else f"{100 * value:.1f}"
        cells.append(f"{shown} ({100 * within[0]:.1f}-{100 * within[1]:.1f})" if within else shown)
    return cells
