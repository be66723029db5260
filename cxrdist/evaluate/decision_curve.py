"""Decision curves: what calling a class is worth to whom (Vickers & Elkin 2006)."""

from typing import Annotated, Literal, TypedDict

import numpy as np
from scipy.special import expit

from cxrdist.bootstrap import Replicates, interval
from cxrdist.data.labels import POSITIVE
from cxrdist.documents import Between, Real
from cxrdist.evaluate.operating_points import Share
from cxrdist.evaluate.scored import Scored
from cxrdist.info import Count
from cxrdist.model.description import Calibration
from cxrdist.model.prediction import calibrated_logits

# Rare findings are acted on from low probabilities, so those are closer together.
THRESHOLDS = (0.01, 0.02, 0.03, 0.05, 0.075, *(place / 20 for place in range(2, 20)))

Values = Annotated[list[Real], Between(1, 1000)]
Intervals = Annotated[list[Annotated[list[Real], Between(2, 2)] | None], Between(1, 1000)]


class ClassCurve(TypedDict):
    """The curve of a class, a value for each threshold, on the images of which it is known."""

    known: Count
    positives: Count
    probabilities: Literal["calibrated", "network"]
    """Which ones are compared with the thresholds."""
    net_benefit: Values
    net_benefit_interval: Intervals
    treat_all: Values
    treat_all_interval: Intervals


class DecisionCurve(TypedDict):
    """The part ``decision_curve`` of metrics.json; to treat none has the net benefit 0."""

    thresholds: Annotated[list[Share], Between(1, 1000)]
    """Probabilities from which on a reader would act."""
    classes: dict[str, ClassCurve]


def decision_curve(
    scored: Scored, replicates: Replicates, calibration: Calibration | None
) -> DecisionCurve:
    """Compute the net benefit of acting on each class from each of `THRESHOLDS` on.

    The net benefit is the share of true positives minus that of false positives, of all images,
    where a false positive weighs the odds of the threshold: who acts from 0.1 on takes nine false
    alarms for one case. Probabilities are calibrated for the classes that have a temperature.
    """
    return {
        "thresholds": [*THRESHOLDS],
        "classes": {
            name: _curve(scored, column, replicates, calibration)
            for column, name in enumerate(scored.classes)
            if (scored.targets[:, column] >= 0).any()
        },
    }


def _curve(
    scored: Scored, column: int, replicates: Replicates, calibration: Calibration | None
) -> ClassCurve:
    name = scored.classes[column]
    known, truth = scored.targets[:, column] >= 0, scored.targets[:, column] == POSITIVE
    logits, is_calibrated = scored.logits[:, column], False
    if calibration and name in calibration.temperatures:
        logits, is_calibrated = calibrated_logits(logits[:, None], [name], calibration)[:, 0], True
    thresholds = np.array(THRESHOLDS)
    called = known[:, None] & (expit(logits)[:, None] >= thresholds)
    worth = np.where(truth[:, None], 1.0, -thresholds / (1 - thresholds))  # of a call
    counts = np.column_stack([called * worth, truth, known])
    totals = np.vstack([counts.sum(axis=0), replicates.sums(counts)])
    images, positives = totals[:, [-1]], totals[:, [-2]]
    with np.errstate(invalid="ignore"):
        model = totals[:, :-2] / images
        treat_all = (positives + (images - positives) * -thresholds / (1 - thresholds)) / images
    return {
        "known": int(known.sum()),
        "positives": int(truth.sum()),
        "probabilities": "calibrated" if is_calibrated else "network",
        "net_benefit": np.round(model[0], 6).tolist(),
        "net_benefit_interval": [interval(values) for values in model[1:].T],
        "treat_all": np.round(treat_all[0], 6).tolist(),
        "treat_all_interval": [interval(values) for values in treat_all[1:].T],
    }
