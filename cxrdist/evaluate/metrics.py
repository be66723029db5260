"""Metrics of one split from all its logits, by torchmetrics.

Classes are chosen and images ranked by logits and never by probabilities, which run together: in
float32 the sigmoid of 18 and that of 25 are both 1.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cxrdist.documents import Between, Text
from cxrdist.evaluate.provenance import ExternalInfo
from cxrdist.info import Count
from cxrdist.terminal import table

SCORES = ("recall", "precision", "f1", "auroc")
Share = Annotated[float, Between(0, 1)]
LABEL_SCORES = ("auroc", "average_precision", "f1", "recall", "precision")
THRESHOLD = 0.5  # of a probability, from which on a label counts as predicted; not tuned
THRESHOLD_LOGIT = math.log(THRESHOLD / (1 - THRESHOLD))  # the logit with this probability: 0


def _functional() -> Any:
    """Import torchmetrics on first use: it loads SciPy and matplotlib, a third of a start."""
    from torchmetrics import functional

    return functional


def to_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the sigmoid of logits of any shape, in float64."""
    probabilities: NDArray[np.float64] = torch.sigmoid(torch.from_numpy(logits).double()).numpy()
    return probabilities


def predicted_classes(logits: Sequence[float], classes: Sequence[str], task: str) -> list[str]:
    """Name the classes that the logits of one image predict.

    Args:
        logits: one for each class.
        classes: names in the order of the logits.
        task: multiclass or multilabel.

    Returns:
        The class of the largest logit, the first one of equal ones; of several labels all whose
        probability is at least `THRESHOLD`, or none.
    """
    if task == "multilabel":
        pairs = zip(classes, logits, strict=True)
        return [name for name, logit in pairs if logit >= THRESHOLD_LOGIT]
    return [classes[logits.index(max(logits))]]


class Scores(TypedDict):
    """Scores of a class or label; None where a score is undefined."""

    recall: Share | None
    precision: Share | None
    f1: Share | None
    auroc: Share | None
    average_precision: NotRequired[Share | None]
    known: NotRequired[Count]
    """Images of which it is known whether they have the label."""
    positives: NotRequired[Count]
    reason: NotRequired[Text | None]
    """Why there is no AUROC; None if there is one."""


class Metrics(TypedDict):
    """The content of metrics.json; further figures may stand beside these."""

    samples: Count
    task: Literal["multiclass", "multilabel"]
    index_sha256: NotRequired[str]
    accuracy: NotRequired[Share | None]
    confusion_matrix: NotRequired[list[list[Count]]]
    """Rows: truth, columns: prediction."""
    threshold: NotRequired[Share]
    classes: dict[str, Scores]
    macro: Scores
    macro_labels: NotRequired[dict[str, Count]]
    external: NotRequired[ExternalInfo]


def compute_metrics(logits: Tensor, labels: Tensor, classes: list[str]) -> dict[str, Any]:
    """Accuracy, confusion matrix, and each class against the rest, as in the paper's Table 2.

    The predicted class is the one with the largest logit, the first one of equal ones. What is
    undefined is None: recall of a class without samples, precision of a class that was never
    predicted, AUROC where one side is empty. The macro mean of a score is None where one class has
    none.

    Args:
        logits: float [N, classes].
        labels: int64 [N].
        classes: names in the order of the columns.

    Returns:
        samples, task, accuracy, confusion_matrix (rows: truth, columns: prediction), classes,
        macro.
    """
    functional = _functional()
    predicted = logits.argmax(dim=1)
    task: dict[str, Any] = {"task": "multiclass", "num_classes": len(classes)}
    by_class = {
        name: _one_against_rest(_ranks(logits[:, i]), predicted == i, labels == i)
        for i, name in enumerate(classes)
    }
    return {
        "samples": len(labels),
        "task": "multiclass",
        "accuracy": _digits(functional.accuracy(predicted, labels, average="micro", **task)),
        "confusion_matrix": functional.confusion_matrix(predicted, labels, **task).tolist(),
        "classes": by_class,
        "macro": {score: _mean([by_class[name][score] for name in classes]) for score in SCORES},
    }


def compute_label_metrics(logits: Tensor, targets: Tensor, classes: list[str]) -> dict[str, Any]:
    """The scores of each label of images that may have several, over the images where it is known.

    A label is predicted where its logit is at least that of the probability `THRESHOLD`. What is
    undefined is None, as in `compute_metrics`; a label that all known images have, or none, has no
    AUROC and no average precision, and a reason. The macro mean is over the labels for which a
    score is defined, and says of how many.

    Args:
        logits: float [N, classes].
        targets: [N, classes], 1 where an image has the label, below 0 where that is not known.
        classes: names in the order of the columns.

    Returns:
        samples, task, threshold, classes (with ``known``, ``positives`` and ``reason``), macro, and
        macro_labels: the number of labels that each mean is over.
    """
    by_class: dict[str, dict[str, Any]] = {
        name: _score_label(logits[known, i], targets[known, i] == 1)
        for i, (name, known) in enumerate(zip(classes, (targets >= 0).T, strict=True))
    }
    defined = {
        score: [float(v) for c in by_class.values() if (v := c[score]) is not None]
        for score in LABEL_SCORES
    }
    return {
        "samples": len(targets),
        "task": "multilabel",
        "threshold": THRESHOLD,
        "classes": by_class,
        "macro": {score: _mean(list(values)) for score, values in defined.items()},
        "macro_labels": {score: len(values) for score, values in defined.items()},
    }


def _score_label(logits: Tensor, truth: Tensor) -> dict[str, Any]:
    """Score one label over the n images of which it is known: logits, float [n], and bool [n]."""
    known, positives = len(truth), int(truth.sum())
    ranks, average, reason = _ranks(logits), None, None
    if 0 < positives < known:
        average_precision = _functional().classification.binary_average_precision
        average = _digits(average_precision(ranks, truth.long()))
    elif not known:
        reason = "the label is known of no image"
    else:
        reason = f"{'all' if positives else 'none'} of the {known} known images have the label"
    return {
        "known": known,
        "positives": positives,
        **_one_against_rest(ranks, logits >= THRESHOLD_LOGIT, truth),
        "average_precision": average,
        "reason": reason,
    }


def mean_auroc(logits: Tensor, targets: Tensor) -> float | None:
    """The mean AUROC of the labels for which it is defined, None if there is none.

    Args:
        logits: float [N, classes].
        targets: [N, classes], 1 where an image has the label, below 0 where that is not known.
    """
    auroc, values = _functional().classification.binary_auroc, []
    for i, known in enumerate((targets >= 0).T):
        truth = targets[known, i].long()
        if len(truth.unique()) == 2:
            values.append(auroc(_ranks(logits[known, i]), truth))
    return float(torch.stack(values).mean()) if values else None


def _ranks(logits: Tensor) -> Tensor:
    """Replace logits [N] by their places in order: float64 between 0 and 1, equal for equal ones.

    Scores of a ranking stay as they are. torchmetrics would take the float32 sigmoid of values
    that are not within 0 and 1 (`normalize_logits_if_needed`) and tie the largest logits.
    """
    places = torch.unique(logits, return_inverse=True)[1]
    return (places.double() + 1) / (len(logits) + 1)


def _one_against_rest(ranks: Tensor, predicted: Tensor, truth: Tensor) -> dict[str, float | None]:
    scores = _functional().classification
    has_truth, has_prediction = bool(truth.any()), bool(predicted.any())
    has_both = has_truth and not bool(truth.all())
    guess, target = predicted.long(), truth.long()
    return {
        "recall": _digits(scores.binary_recall(guess, target)) if has_truth else None,
        "precision": _digits(scores.binary_precision(guess, target)) if has_prediction else None,
        "f1": _digits(scores.binary_f1_score(guess, target))
        if has_truth or has_prediction
        else None,
        "auroc": _digits(scores.binary_auroc(ranks, target)) if has_both else None,
    }


def _digits(value: Tensor) -> float:
    """Six decimals, which torchmetrics' float32 holds; more would be made up."""
    return round(float(value), 6)


def _mean(scores: list[float | None]) -> float | None:
    defined = [score for score in scores if score is not None]
    return round(sum(defined) / len(defined), 6) if 0 < len(defined) == len(scores) else None


def metrics_table(metrics: dict[str, Any]) -> str:
    """The paper's Table 2 for the terminal, with AUROC; of several labels their own table."""
    if metrics["task"] == "multilabel":
        return _label_table(metrics)
    rows = [[name, *_cells(scores)] for name, scores in metrics["classes"].items()]
    rows.append(["All classes mean", *_cells(metrics["macro"])])
    return table(rows, ("Class", "Recall", "Precision", "F1 score", "AUROC"))


def _label_table(metrics: dict[str, Any]) -> str:
    rows = [
        [name, str(scores["positives"]), str(scores["known"]), *_cells(scores, LABEL_SCORES)]
        for name, scores in metrics["classes"].items()
    ]
    rows.append(["Mean", "", "", *_cells(metrics["macro"], LABEL_SCORES)])
    rows.append(["of labels", "", "", *(str(metrics["macro_labels"][s]) for s in LABEL_SCORES)])
    headers = ("AUROC", "Average precision", "F1 score", "Recall", "Precision")
    reasons = [
        f"{name}: no AUROC, {scores['reason']}"
        for name, scores in metrics["classes"].items()
        if scores["reason"]
    ]
    return "\n".join([table(rows, ("Label", "Images", "of known", *headers)), *reasons])


def headline(metrics: dict[str, Any]) -> str:
    """The metrics in one line."""
    if metrics["task"] == "multiclass":
        right = f"{correct_of(metrics)} of {metrics['samples']}"
        return f"accuracy {metrics['accuracy']:.3f} ({right})"
    value, labels = metrics["macro"]["auroc"], metrics["macro_labels"]["auroc"]
    shown = "-" if value is None else f"{value:.3f}"
    classes, samples = metrics["classes"], metrics["samples"]
    known = sum(scores["known"] for scores in classes.values()) / (samples * len(classes))
    unknown = f", {known:.0%} of their labels are known" if known < 1 else ""
    return f"mean AUROC {shown} over {labels} of {len(classes)} labels ({samples} images{unknown})"


def _cells(scores: dict[str, float | None], names: Sequence[str] = SCORES) -> list[str]:
    values = [scores[name] for name in names]
    return ["-" if value is None else f"{value:.3f}" for value in values]


def correct_of(metrics: dict[str, Any]) -> int:
    """How many samples were predicted right."""
    return int(torch.tensor(metrics["confusion_matrix"]).trace())
