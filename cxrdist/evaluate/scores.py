"""The scores of all classes and their means, with intervals by patient."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from cxrdist.bootstrap import Limits, Replicates
from cxrdist.data.labels import POSITIVE
from cxrdist.evaluate.metrics import (
    INTERVALS,
    SCORES,
    Metrics,
    ScoreName,
    Scores,
    compute_label_metrics,
    compute_metrics,
)
from cxrdist.evaluate.scored import Scored
from cxrdist.intervals import bounded, of_auroc, of_mean, of_share, wilson
from cxrdist.terminal import counted

# The interval of each class, None where the score is undefined; the replicates of each class.
Figures = tuple[list[Limits | None], NDArray[np.float64]]


def score(scored: Scored, replicates: Replicates, fewest: int) -> Metrics:
    """Compute the scores of all classes and their means.

    A class with fewer than `fewest` positives, or negatives, has too few images.

    Returns:
        The result of `compute_metrics` or `compute_label_metrics`, rounded, with NAME_interval
        beside each score, the number of patients and ``too_few`` of each class, and, if some
        classes have too few images, macro_enough, the means without them.
    """
    logits, targets = torch.from_numpy(scored.logits), torch.from_numpy(scored.targets)
    if scored.task == "multilabel":
        metrics = compute_label_metrics(logits, targets, scored.classes)
    else:
        metrics = compute_metrics(logits, targets.long().argmax(1), scored.classes)
        _add_accuracy_intervals(metrics, scored, replicates)
    for name, target in zip(scored.classes, scored.targets.T, strict=True):
        _count(metrics["classes"][name], target, replicates, fewest)
    figures = _shares(scored, replicates) | _rankings(scored, replicates, metrics["classes"])
    for name, of_score in figures.items():
        _add_intervals(metrics, name, of_score)
    enough = [not scores["too_few"] for scores in metrics["classes"].values()]
    if not all(enough):
        means: dict[str, float | Limits | None] = {}
        for name, of_score in figures.items():
            means[name], means[INTERVALS[name]] = _mean(metrics, name, of_score, enough)
        metrics["macro_enough"] = cast(Scores, means)
    metrics["fewest"] = fewest
    _round(metrics)
    return metrics


def _round(metrics: Metrics) -> None:
    """Round all scores to six decimals, as their intervals are already."""
    means = [metrics[name] for name in ("macro", "macro_enough") if name in metrics]
    for scores in (*metrics["classes"].values(), *means):
        for name in SCORES:
            scores[name] = _digits(scores[name])
    if "accuracy" in metrics:
        metrics["accuracy"] = _digits(metrics["accuracy"])


def _digits(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def too_few(positives: int, negatives: int, fewest: int) -> str | None:
    """Return which images are too few for a headline, such as "7 positives"; None if enough."""
    if min(positives, negatives) >= fewest:
        return None
    number, kind = min((positives, "positive"), (negatives, "negative"))
    return counted(number, kind)


def _count(scores: Scores, target: NDArray[np.int8], replicates: Replicates, fewest: int) -> None:
    known, positive = target >= 0, target == POSITIVE
    positives = int(positive.sum())
    scores["patients"] = replicates.patients(known)
    scores["positive_patients"] = replicates.patients(positive)
    scores["too_few"] = too_few(positives, int(known.sum()) - positives, fewest)


def _add_accuracy_intervals(metrics: Metrics, scored: Scored, replicates: Replicates) -> None:
    right = scored.predicted.argmax(1) == (scored.targets == POSITIVE).argmax(1)
    everything = np.ones(len(right), bool)
    metrics["accuracy_interval"] = of_share(replicates, right, everything)
    metrics["accuracy_wilson"] = wilson(int(right.sum()), len(right)) if len(right) else None


def _shares(scored: Scored, replicates: Replicates) -> dict[ScoreName, Figures]:
    """Compute the intervals of scores that are shares of images, or derive from one (F1)."""
    predicted, known, truth = scored.predicted, scored.targets >= 0, scored.targets == POSITIVE
    pairs: dict[ScoreName, tuple[NDArray[np.bool_], NDArray[np.bool_]]] = {
        "recall": (predicted, truth),
        "specificity": (~predicted, known & ~truth),
        "precision": (truth, known & predicted),
        # F1 is no share of images, but a function of one: Jaccard's index.
        "f1": (truth & predicted, known & (truth | predicted)),
    }
    figures: dict[ScoreName, Figures] = {}
    for name, (parts, wholes) in pairs.items():
        values = replicates.shares(parts, wholes)
        columns = zip(parts.T, wholes.T, values, strict=True)
        figures[name] = [of_share(replicates, *column) for column in columns], values
    limits, values = figures["f1"]
    figures["f1"] = (
        [pair and [round(_f1(side), 6) for side in pair] for pair in limits],
        _f1(values),
    )
    return figures


def _f1(jaccard: Any) -> Any:
    """Return F1 from Jaccard's index; it is monotonic, so limits can be converted as well."""
    return 2 * jaccard / (1 + jaccard)


def _rankings(
    scored: Scored, replicates: Replicates, classes: dict[str, Scores]
) -> dict[ScoreName, Figures]:
    """Compute the intervals of AUROC and average precision; their values are in `classes`."""
    names: tuple[ScoreName, ...] = ("auroc", "average_precision")
    limits: dict[ScoreName, list[Limits | None]] = {name: [None] * len(classes) for name in names}
    values = {name: np.full((len(classes), len(replicates.draws)), np.nan) for name in limits}
    for i, scores in enumerate(classes.values()):
        area, precision = scores["auroc"], scores["average_precision"]
        if area is None or precision is None:
            continue
        known = scored.targets[:, i] >= 0
        truth, drawn = scored.targets[known, i] == POSITIVE, replicates.take(known)
        auroc, average = drawn.ranking(scored.logits[known, i], truth)
        limits["auroc"][i] = of_auroc(drawn, area, auroc, truth)
        limits["average_precision"][i] = bounded(precision, average, drawn.patients(truth))
        values["auroc"][i], values["average_precision"][i] = auroc, average
    return {name: (limits[name], values[name]) for name in limits}


def _add_intervals(metrics: Metrics, name: ScoreName, figures: Figures) -> None:
    """Put the intervals of one score beside it in each class and in their mean."""
    classes, macro = metrics["classes"].values(), metrics["macro"]
    for scores, limits in zip(classes, figures[0], strict=True):
        scores[INTERVALS[name]] = limits
    macro[INTERVALS[name]] = (
        None if macro[name] is None else _mean(metrics, name, figures, [True] * len(classes))[1]
    )


def _mean(
    metrics: Metrics, name: ScoreName, figures: Figures, counts: Sequence[bool]
) -> tuple[float | None, Limits | None]:
    """Average one score over the counted classes that have it, with the interval of the mean."""
    # Without an interval (`pair`) a score is undefined.
    columns = zip(metrics["classes"].values(), figures[0], counts, strict=True)
    defined = {
        i: (scores[name], pair) for i, (scores, pair, count) in enumerate(columns) if count and pair
    }
    if not defined:
        return None, None
    estimates, limits = zip(*defined.values(), strict=True)
    return float(np.mean(estimates)), of_mean(estimates, limits, figures[1][list(defined)])
