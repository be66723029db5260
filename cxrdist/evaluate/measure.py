"""All figures of some scored images: one function of each part, in one document, metrics.json."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cxrdist.bootstrap import REPLICATES, SEED, Replicates, draw
from cxrdist.data.labels import POSITIVE
from cxrdist.evaluate.metrics import compute_label_metrics, compute_metrics
from cxrdist.evaluate.scored import Scored
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
    """Name the rarest class that each image has, or none.

    So there are at most as many strata as classes and one, and no replicate lacks a class.
    """
    has = scored.targets == POSITIVE
    rare_first = np.argsort(has.sum(axis=0), kind="stable")
    first = has[:, rare_first].argmax(axis=1)
    names = [scored.classes[column] for column in rare_first]
    return [
        names[place] if any_of_them else ""
        for place, any_of_them in zip(first, has.any(axis=1), strict=True)
    ]


def measure(scored: Scored, settings: Settings) -> dict[str, Any]:
    """Compute the figures of metrics.json.

    Each other part adds one line here, a key of its own, from (scored, replicates, settings).
    """
    return score(scored, replicate(scored, settings), settings)


def score(scored: Scored, replicates: Replicates, settings: Settings) -> dict[str, Any]:
    """Compute the scores of all classes and their means."""
    logits, targets = torch.from_numpy(scored.logits), torch.from_numpy(scored.targets)
    if scored.task == "multilabel":
        return compute_label_metrics(logits, targets, scored.classes)
    return compute_metrics(logits, targets.long().argmax(1), scored.classes)
