"""All figures of scored images for metrics.json; each member has its own function."""

from dataclasses import dataclass

from cxrdist.bootstrap import REPLICATES, Replicates, draw, rarest_class
from cxrdist.data.labels import POSITIVE
from cxrdist.evaluate.calibration import calibration_figures
from cxrdist.evaluate.decision_curve import decision_curve
from cxrdist.evaluate.groups import compare_groups
from cxrdist.evaluate.metrics import Metrics
from cxrdist.evaluate.operating_points import operating_points
from cxrdist.evaluate.scored import Scored
from cxrdist.evaluate.scores import score
from cxrdist.intervals import describe
from cxrdist.model.description import Calibration


@dataclass(frozen=True)
class Settings:
    """The settings that figures depend on besides the images.

    Attributes:
        fewest: a score with fewer positives, or fewer negatives, has too few images.
        prevalence: share of patients with each class where the model will be used; None for that of
            the images only.
        calibration: temperatures and thresholds chosen on the validation split; None before that.
        replicates: number of bootstrap replicates.
    """

    fewest: int = 10
    prevalence: float | None = None
    calibration: Calibration | None = None
    replicates: int = REPLICATES


def replicate(scored: Scored, settings: Settings) -> Replicates:
    """Draw bootstrap replicates of the patients, stratified by the rarest class of each."""
    return draw(scored.patients, strata(scored), settings.replicates)


def strata(scored: Scored) -> list[str]:
    """Return for each image the rarest class of its patient."""
    return rarest_class(scored.targets == POSITIVE, scored.patients)


def measure(scored: Scored, settings: Settings) -> Metrics:
    """Compute the figures of metrics.json."""
    replicates, calibration = replicate(scored, settings), settings.calibration
    scores = score(scored, replicates, settings.fewest)
    metrics: Metrics = {"format": "cxrdist-metrics-1", **scores}
    metrics["intervals"] = describe(replicates)
    if calibration:
        points = operating_points(scored, replicates, calibration, settings.prevalence)
        metrics["operating_points"] = points
    metrics["calibration"] = calibration_figures(scored, replicates, calibration)
    metrics["decision_curve"] = decision_curve(scored, replicates, calibration)
    thresholds = calibration.thresholds if calibration else None
    metrics["groups"] = compare_groups(scored, replicates, settings.fewest, thresholds)
    return metrics
