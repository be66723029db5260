"""Decision curves: the net benefit of calling a class (Vickers & Elkin 2006)."""

from typing import Annotated, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from cxrdist.bootstrap import Replicates
from cxrdist.data.labels import POSITIVE
from cxrdist.documents import Between, Real, Share
from cxrdist.evaluate.scored import Scored
from cxrdist.info import Count
from cxrdist.intervals import unbounded
from cxrdist.model.description import Calibration
from cxrdist.model.prediction import calibrated_logits

# Denser at low probabilities, where readers act on rare findings.
# They end before 1, whose odds are infinite.
THRESHOLDS = (0.01, 0.02, 0.03, 0.05, 0.075, *(step / 20 for step in range(2, 20)))

Values = Annotated[list[Real], Between(1, 1000)]
Intervals = Annotated[list[Annotated[list[Real], Between(2, 2)] | None], Between(1, 1000)]


class ClassCurve(TypedDict):
    """The curve of a class, one value per threshold, over the images for which it is known."""

    known: Count
    positives: Count
    probabilities: Literal["calibrated", "network"]
    """Which probabilities are compared with the thresholds."""
    net_benefit: Values
    net_benefit_interval: Intervals
    treat_all: Values
    treat_all_interval: Intervals


class DecisionCurve(TypedDict):
    """The member ``decision_curve`` of metrics.json; treating none has a net benefit of 0."""

    thresholds: Annotated[list[Share], Between(1, 1000)]
    """Probabilities at or above which a reader would act."""
    classes: dict[str, ClassCurve]


def decision_curve(
    scored: Scored, replicates: Replicates, calibration: Calibration | None
) -> DecisionCurve:
    """Compute the net benefit of acting on each class at each of `THRESHOLDS`.

    The net benefit is the number of true positives minus that of false positives, weighted by the
    odds of the threshold, per image: a reader who acts from 0.1 on accepts nine false alarms per
    case. Probabilities are calibrated for the classes that have a temperature. Intervals are for
    the share of positives in these images (`cxrdist.intervals`), on which the net benefit depends.
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
    # As logits: the sigmoid of log(0.9 / 0.1) is below 0.9, so a table's 0.9 would not be called.
    called = known[:, None] & (logits[:, None] >= logit(thresholds))
    worth = np.where(truth[:, None], 1.0, -thresholds / (1 - thresholds))  # of one call
    counts = np.column_stack([called * worth, truth, known])
    totals = np.vstack([counts.sum(axis=0), replicates.sums(counts)])
    images, positives = totals[:, [-1]], totals[:, [-2]]
    with np.errstate(invalid="ignore"):
        model = totals[:, :-2] / images
        treat_all = (positives + (images - positives) * -thresholds / (1 - thresholds)) / images
    # The patients of the smaller side, as for an AUROC; of the other one if it has none.
    sides = (replicates.patients(truth), replicates.patients(known & ~truth))
    patients = min(filter(None, sides))

    def limits(values: NDArray[np.float64]) -> list[list[float] | None]:
        return [unbounded(float(own[0]), own[1:], patients) for own in values.T]

    return {
        "known": int(known.sum()),
        "positives": int(truth.sum()),
        "probabilities": "calibrated" if is_calibrated else "network",
        "net_benefit": np.round(model[0], 6).tolist(),
        "net_benefit_interval": limits(model),
        "treat_all": np.round(treat_all[0], 6).tolist(),
        "treat_all_interval": limits(treat_all),
    }
