"""All figures of some scored images: one function of each part, in one document, metrics.json."""

from dataclasses import dataclass
from typing import Any

from cxrdist.bootstrap import REPLICATES, SEED, Replicates, draw, rarest_class
from cxrdist.data.labels import POSITIVE
from cxrdist.evaluate.groups import compare_groups
from cxrdist.evaluate.scored import Scored
from cxrdist.evaluate.scores import score
from cxrdist.intervals import describe
from cxrdist.model.description import Calibration


@dataclass(frozen=True)
class Settings:
    """What figures depend on besides the images.

    Attributes:
        fewest: positives, and negatives, below which a score rests on too few images.
        prevalence: of each class where the model is to be used; None for that of the images only.
        calibration: what was chosen on the validation split; None before it was evaluated.
        replicates: of the bootstrap.
        seed: of the bootstrap.
    """

    fewest: int = 10
    prevalence: float | None = None
    calibration: Calibration | None = None
    replicates: int = REPLICATES
    seed: int = SEED


def replicate(scored: Scored, settings: Settings) -> Replicates:
    """Draw the patients of some images for their intervals, within the rarest class of each."""
    return draw(scored.patients, strata(scored), settings.replicates, settings.seed)


def strata(scored: Scored) -> list[str]:
    """Give each image the rarest class that its patient has."""
    return rarest_class(scored.targets == POSITIVE, scored.patients)


def measure(scored: Scored, settings: Settings) -> dict[str, Any]:
    """Compute the figures of metrics.json.

    Each other part adds one line here, a key of its own, from (scored, replicates, settings).
    """
    replicates = replicate(scored, settings)
    metrics = score(scored, replicates, settings.fewest)
    metrics["intervals"] = describe(replicates, settings.seed)
    thresholds = settings.calibration.thresholds if settings.calibration else None
    metrics["groups"] = compare_groups(scored, replicates, settings.fewest, thresholds)
    return metrics
