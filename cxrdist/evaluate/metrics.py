"""Metrics of one split from all its predictions, by torchmetrics."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional import accuracy, confusion_matrix
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_f1_score,
    binary_precision,
    binary_recall,
)

from cxrdist.terminal import table

SCORES = ("recall", "precision", "f1", "auroc")


def compute_metrics(probabilities: Tensor, labels: Tensor, classes: list[str]) -> dict[str, Any]:
    """Accuracy, confusion matrix, and each class against the rest, as in the paper's Table 2.

    The predicted class is the one with the largest probability. What is undefined is None: recall
    of a class without samples, precision of a class that was never predicted, AUROC where one side
    is empty. The macro mean of a score is None where one class has none.

    Args:
        probabilities: float [N, classes], each 0..1.
        labels: int64 [N].
        classes: names in the order of the columns.

    Returns:
        samples, accuracy, confusion_matrix (rows: truth, columns: prediction), classes, macro.
    """
    predicted = probabilities.argmax(dim=1)
    task: dict[str, Any] = {"task": "multiclass", "num_classes": len(classes)}
    by_class = {
        name: _one_against_rest(probabilities[:, i], predicted == i, labels == i)
        for i, name in enumerate(classes)
    }
    return {
        "samples": len(labels),
        "accuracy": _digits(accuracy(predicted, labels, average="micro", **task)),
        "confusion_matrix": confusion_matrix(predicted, labels, **task).tolist(),
        "classes": by_class,
        "macro": {score: _mean([by_class[name][score] for name in classes]) for score in SCORES},
    }


def _one_against_rest(
    probability: Tensor, predicted: Tensor, truth: Tensor
) -> dict[str, float | None]:
    has_truth, has_prediction = bool(truth.any()), bool(predicted.any())
    has_both = has_truth and not bool(truth.all())
    guess, target = predicted.long(), truth.long()
    return {
        "recall": _digits(binary_recall(guess, target)) if has_truth else None,
        "precision": _digits(binary_precision(guess, target)) if has_prediction else None,
        "f1": _digits(binary_f1_score(guess, target)) if has_truth or has_prediction else None,
        "auroc": _digits(binary_auroc(probability, target)) if has_both else None,
    }


def _digits(value: Tensor) -> float:
    """Six decimals, which torchmetrics' float32 holds; more would be made up."""
    return round(float(value), 6)


def _mean(scores: list[float | None]) -> float | None:
    defined = [score for score in scores if score is not None]
    return round(sum(defined) / len(defined), 6) if len(defined) == len(scores) else None


def metrics_table(metrics: dict[str, Any]) -> str:
    """The paper's Table 2 for the terminal, with AUROC."""
    rows = [[name, *_cells(scores)] for name, scores in metrics["classes"].items()]
    rows.append(["All classes mean", *_cells(metrics["macro"])])
    return table(rows, ("Class", "Recall", "Precision", "F1 score", "AUROC"))


def _cells(scores: dict[str, float | None]) -> list[str]:
    values = [scores[name] for name in SCORES]
    return ["-" if value is None else f"{value:.3f}" for value in values]


def correct_of(metrics: dict[str, Any]) -> int:
    """How many samples were predicted right."""
    return int(torch.tensor(metrics["confusion_matrix"]).trace())
