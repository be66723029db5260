"""Metrics of one split from all its logits, computed with torchmetrics.

Values are float64 and not rounded, so that means, and the differences of
`cxrdist.evaluate.compare`, are of exactly the same figures. `cxrdist.evaluate.scores` rounds them
for metrics.json.

Classes are chosen and images ranked by logits, never by probabilities, because those coincide: in
float32 the sigmoids of 18 and 25 are both 1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from textwrap import fill
from typing import Any, Literal, NotRequired, TypedDict, cast, get_args

import numpy as np
import torch
from torch import Tensor

from cxrdist.bootstrap import LEVEL, Limits
from cxrdist.documents import Share, Text
from cxrdist.evaluate.calibration import CalibrationFigures
from cxrdist.evaluate.decision_curve import DecisionCurve
from cxrdist.evaluate.groups import Groups
from cxrdist.evaluate.operating_points import OperatingPoints
from cxrdist.info import Count, Task
from cxrdist.intervals import Intervals
from cxrdist.model.prediction import THRESHOLD, decide
from cxrdist.terminal import counted, rounded, table

ScoreName = Literal["recall", "specificity", "precision", "f1", "auroc", "average_precision"]
IntervalName = Literal[
    "recall_interval",
    "specificity_interval",
    "precision_interval",
    "f1_interval",
    "auroc_interval",
    "average_precision_interval",
]
SCORES: tuple[ScoreName, ...] = get_args(ScoreName)
# `IntervalName` lists the scores in the order of `ScoreName`, on which the zip relies.
INTERVALS = dict(zip(SCORES, cast(tuple[IntervalName, ...], get_args(IntervalName)), strict=True))
"""The member of `Scores` that holds the interval of a score."""
TITLES: dict[ScoreName, str] = {
    "auroc": "AUROC",
    "average_precision": "Average\nprec.",
    "recall": "Recall",
    "specificity": "Speci-\nficity",
    "precision": "Precision",
    "f1": "F1\nscore",
}
"""The scores in the order of the terminal's table."""


@contextmanager
def _torchmetrics() -> Iterator[Any]:
    """Import the functions of torchmetrics, and let them divide counts in float64.

    The import is on first use: it loads SciPy and matplotlib, a third of start-up.
    """
    from torchmetrics import functional

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # the type of a quotient of integers
    try:
        yield functional.classification
    finally:
        torch.set_default_dtype(before)


class Scores(TypedDict):
    """Scores of a class or label, or their means; None where a score is undefined.

    Each score has its 95 % interval beside it (`INTERVALS`). Documents of older versions lack
    intervals, specificity and other members.
    """

    recall: Share | None
    precision: Share | None
    f1: Share | None
    auroc: Share | None
    specificity: NotRequired[Share | None]
    average_precision: NotRequired[Share | None]
    recall_interval: NotRequired[Limits | None]
    specificity_interval: NotRequired[Limits | None]
    precision_interval: NotRequired[Limits | None]
    f1_interval: NotRequired[Limits | None]
    auroc_interval: NotRequired[Limits | None]
    average_precision_interval: NotRequired[Limits | None]
    known: NotRequired[Count]
    """Images for which it is known whether they have the label."""
    positives: NotRequired[Count]
    patients: NotRequired[Count]
    """Patients of the known images."""
    positive_patients: NotRequired[Count]
    too_few: NotRequired[Text | None]
    """Which images are too few for a headline, such as "7 positives"; None if there are enough."""
    reason: NotRequired[Text | None]
    """Why there is no AUROC; None if there is one."""


class ExternalInfo(TypedDict):
    """The member ``external`` of metrics.json."""

    name: Text
    shards: Text
    """Their path."""
    label_map: dict[str, str | None]
    """From a label of the set to the model's, or to null if it was left out."""
    classes: list[str]
    """Classes that both have; scores of the others are undefined."""
    other_classes: dict[str, Count]
    """Number of images left out, by class that the model does not have."""
    images: Count
    """Number of images of the split, without those of other classes."""
    seen: Literal["drop", "report"]
    """Whether images that the network has seen were left out of the scores or marked."""
    seen_images: Count
    reasons: dict[str, Count]
    """Number of seen images by reason."""
    patients_told: Count
    """Images whose patient was searched for among those of the training; 0 if these are unknown."""
    not_known: NotRequired[Text | None]
    """Why it is unknown what the network has seen; None if it is known."""


class Metrics(TypedDict):
    """The content of metrics.json; other programs may add members."""

    format: NotRequired[Literal["cxrdist-metrics-1"]]
    """Missing in documents of older versions."""
    samples: Count
    task: Task
    split: NotRequired[str]
    index_sha256: NotRequired[str]
    accuracy: NotRequired[Share | None]
    accuracy_interval: NotRequired[Limits | None]
    accuracy_wilson: NotRequired[Limits | None]
    """Wilson's interval (1927), which treats images as independent and is too narrow if they are
    not."""
    confusion_matrix: NotRequired[list[list[Count]]]
    """Rows: truth, columns: prediction."""
    threshold: NotRequired[Share]
    fewest: NotRequired[Count]
    """A class with fewer positives, or fewer negatives, has too few images."""
    intervals: NotRequired[Intervals]
    groups: NotRequired[Groups]
    classes: dict[str, Scores]
    macro: Scores
    macro_labels: NotRequired[dict[str, Count]]
    operating_points: NotRequired[OperatingPoints]
    calibration: NotRequired[CalibrationFigures]
    decision_curve: NotRequired[DecisionCurve]
    macro_enough: NotRequired[Scores]
    """Means without the classes with too few images, for the headline; only if there are such."""
    external: NotRequired[ExternalInfo]


def compute_metrics(logits: Tensor, labels: Tensor, classes: list[str]) -> Metrics:
    """Score each class against the rest, as in the paper's Table 2, and compute the accuracy.

    The predicted class has the largest logit; of equal ones the first. Undefined scores are None:
    recall of a class without samples, precision of a class that was never predicted, AUROC without
    positives or without negatives. The macro mean of a score is None if a class lacks it.

    Args:
        logits: float [N, classes].
        labels: int64 [N].
        classes: names in the order of the columns.
    """
    decided = torch.from_numpy(decide(logits.numpy(), "multiclass"))
    predicted = decided.long().argmax(dim=1)
    by_class = {
        name: _one_against_rest(logits[:, i], decided[:, i], labels == i)
        for i, name in enumerate(classes)
    }
    with _torchmetrics() as functions:
        accuracy = functions.multiclass_accuracy(predicted, labels, len(classes), average="micro")
        confusion = functions.multiclass_confusion_matrix(predicted, labels, len(classes))
    return {
        "samples": len(labels),
        "task": "multiclass",
        "accuracy": float(accuracy),
        "confusion_matrix": confusion.tolist(),
        "classes": by_class,
        "macro": means({score: [c[score] for c in by_class.values()] for score in SCORES}),
    }


def compute_label_metrics(logits: Tensor, targets: Tensor, classes: list[str]) -> Metrics:
    """Score each label of images with several labels, over the images for which it is known.

    A label is predicted if its logit is at least that of the probability `THRESHOLD`. Undefined
    scores are None, as in `compute_metrics`; a label that all or none of the known images have gets
    no AUROC and no average precision, but a reason. The macro mean is over the labels for which a
    score is defined; macro_labels has their number.

    Args:
        logits: float [N, classes].
        targets: [N, classes], 1 where an image has the label, below 0 where that is unknown.
        classes: names in the order of the columns.
    """
    decided = torch.from_numpy(decide(logits.numpy(), "multilabel"))
    by_class = {
        name: _score_label(logits[known, i], decided[known, i], targets[known, i] == 1)
        for i, (name, known) in enumerate(zip(classes, (targets >= 0).T, strict=True))
    }
    defined: dict[ScoreName, list[float | None]] = {
        score: [c[score] for c in by_class.values() if c[score] is not None] for score in SCORES
    }
    return {
        "samples": len(targets),
        "task": "multilabel",
        "threshold": THRESHOLD,
        "classes": by_class,
        "macro": means(defined),
        "macro_labels": {score: len(values) for score, values in defined.items()},
    }


def _score_label(logits: Tensor, predicted: Tensor, truth: Tensor) -> Scores:
    """Score one label over the n images for which it is known; logits float [n], masks bool [n]."""
    known, positives, reason = len(truth), int(truth.sum()), None
    if not known:
        reason = "the label is known for no image"
    elif positives in (0, known):
        reason = f"{'all' if positives else 'none'} of the {known} known images have the label"
    return {**_one_against_rest(logits, predicted, truth), "reason": reason}


def mean_auroc(logits: Tensor, targets: Tensor) -> float | None:
    """Return the mean AUROC of the labels for which it is defined; None if there are none.

    Logits and targets are those of `compute_label_metrics`.
    """
    values = []
    with _torchmetrics() as functions:
        for i, known in enumerate((targets >= 0).T):
            truth = targets[known, i].long()
            if len(truth.unique()) == 2:
                values.append(float(functions.binary_auroc(_ranks(logits[known, i]), truth)))
    return float(np.mean(values)) if values else None


def _ranks(logits: Tensor) -> Tensor:
    """Replace logits [N] by their ranks, scaled to float64 between 0 and 1; equal ones stay equal.

    Ranking scores do not change. Logits cannot be passed as they are: torchmetrics takes the
    sigmoid of values outside 0 to 1 (`normalize_logits_if_needed`), which ties the largest.
    """
    ranks = torch.unique(logits, return_inverse=True)[1]
    return (ranks.double() + 1) / (len(logits) + 1)


def _one_against_rest(logits: Tensor, predicted: Tensor, truth: Tensor) -> Scores:
    """Count and score n images: logits, float [n], predictions and truth, bool [n]."""
    positives = int(truth.sum())
    # torchmetrics returns 0 for most undefined scores, so these cases are told apart here.
    has_truth, has_both = positives > 0, 0 < positives < len(truth)
    has_prediction = bool(predicted.any())
    guess, target, ranks = predicted.long(), truth.long(), _ranks(logits)

    def score(
        function: Callable[[Tensor, Tensor], Tensor], values: Tensor, is_defined: bool
    ) -> float | None:
        return float(function(values, target)) if is_defined else None

    with _torchmetrics() as functions:
        return {
            "known": len(truth),
            "positives": positives,
            "recall": score(functions.binary_recall, guess, has_truth),
            "specificity": score(functions.binary_specificity, guess, positives < len(truth)),
            "precision": score(functions.binary_precision, guess, has_prediction),
            "f1": score(functions.binary_f1_score, guess, has_truth or has_prediction),
            "auroc": score(functions.binary_auroc, ranks, has_both),
            "average_precision": score(functions.binary_average_precision, ranks, has_both),
        }


def means(values: Mapping[ScoreName, Sequence[float | None]]) -> Scores:
    """Average each score over the classes; None without classes or if one lacks the score."""
    averages = {
        score: float(np.array(column, float).mean()) if column and None not in column else None
        for score, column in values.items()
    }
    return cast(Scores, averages)


def metrics_table(metrics: Metrics) -> str:
    """Format the scores of all classes with intervals for the terminal (the paper's Table 2).

    The table fits into 100 columns; long names are wrapped.
    """
    several = metrics["task"] == "multilabel"
    rows = [
        [fill(name, 18), f"{scores['positives']}\nof {scores['known']}", *_cells(scores)]
        for name, scores in metrics["classes"].items()
    ]
    rows.append(["Mean" if several else "Mean of all classes", "", *_cells(metrics["macro"])])
    if several:
        rows.append(["of labels", "", *(str(metrics["macro_labels"][score]) for score in TITLES)])
    reasons = [
        f"{name}: no AUROC, {scores['reason']}"
        for name, scores in metrics["classes"].items()
        if scores.get("reason")
    ]
    headers = ("Label" if several else "Class", "Images", *TITLES.values())
    return "\n".join([table(rows, headers), *reasons])


def _cells(scores: Scores) -> list[str]:
    """Write each score above its interval, without leading zeros to save columns."""
    cells = []
    for name in TITLES:
        value, limits = scores[name], scores.get(INTERVALS[name])
        cell = rounded(value)
        cells.append(f"{cell}\n{_short(limits[0])}-{_short(limits[1])}" if limits else cell)
    return cells


def _short(value: float) -> str:
    # From 0.9995 on, three decimals would be 1.000, one column wider than .999.
    return f"{value:.3f}".removeprefix("0") if value < 0.9995 else "1.00"


def headline(metrics: Metrics) -> str:
    """Write the main figure with its interval, or that there are too few images for one."""
    if metrics["task"] == "multilabel":
        return _label_headline(metrics)
    samples = metrics["samples"]
    if samples < metrics.get("fewest", 0):
        return f"accuracy: too few to say ({counted(samples, 'image')})"
    limits = _within(metrics, metrics.get("accuracy_interval"))
    right = f"{correct_of(metrics)} of {samples}"
    return f"accuracy {metrics['accuracy']:.3f} ({right}{limits})"


def _label_headline(metrics: Metrics) -> str:
    classes, samples, few = metrics["classes"], metrics["samples"], few_of(metrics)
    mean = headline_means(metrics)
    labels = sum(
        scores["auroc"] is not None for scores in classes.values() if not scores.get("too_few")
    )
    over = f"over {labels} of {len(classes)} labels"
    shown = (
        f" {mean['auroc']:.3f} {over}" if labels else ": too few to say" if few else f" - {over}"
    )
    known = sum(scores["known"] for scores in classes.values()) / (samples * len(classes))
    # Rounded, 599 of 600 known labels would be 100 %.
    share = f"{known:.0%}" if known < 0.995 else "over 99%"
    unknown = f", {share} of their labels are known" if known < 1 else ""
    limits = _within(metrics, mean.get("auroc_interval"))
    return f"mean AUROC{shown} ({counted(samples, 'image')}{unknown}{limits})" + (
        f"; too few to say for {list_few(metrics)}" if few else ""
    )


def headline_means(metrics: Metrics) -> Scores:
    """Return the means over the classes with enough images."""
    return metrics.get("macro_enough", metrics["macro"])


def few_of(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the classes with too few images, each with its number, such as "7 positives".

    The metrics are of one run, or compare two.
    """
    reasons = {name: scores.get("too_few") for name, scores in metrics["classes"].items()}
    return {name: reason for name, reason in reasons.items() if reason}


def list_few(metrics: Mapping[str, Any]) -> str:
    """Return the classes with too few images as text, such as "Hernia (7 positives)"."""
    return ", ".join(f"{name} ({reason})" for name, reason in few_of(metrics).items())


def _within(metrics: Metrics, limits: Limits | None) -> str:
    if not limits:
        return ""
    return (
        f"; {LEVEL:.0%} interval {limits[0]:.3f} to {limits[1]:.3f}, "
        f"{counted(metrics['intervals']['patients'], 'patient')}"
    ).replace("%", " %")


def correct_of(metrics: Metrics) -> int:
    """Count the correctly predicted samples."""
    return int(torch.tensor(metrics["confusion_matrix"]).trace())
