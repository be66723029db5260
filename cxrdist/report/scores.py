"""The scores of a split as the report shows them, of one label an image or of several."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from cxrdist.errors import CxrdistError
from cxrdist.report import pictures
from cxrdist.report.files import Sample
from cxrdist.report.values import MEASURES, count, number, percent, share
from cxrdist.run import RunDirectory, options_of

NEEDS = {
    "recall": "it needs an image of this class",
    "precision": "it needs an image predicted as this",
    "f1": "it needs an image of this class or one predicted as it",
    "auroc": "it needs images of this class and of others",
    "average_precision": "it needs images of this class and of others",
}
_DIGITS = 1e-6  # of a score in metrics.json


def score_view(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Gather what the page says of the scores: names, tiles, rows of the table, reasons."""
    known = {name: known_images(metrics, name) for name in metrics["classes"]}
    return {
        "measures": MEASURES[metrics["task"]],
        "tiles": _tiles(metrics),
        "undefined": _undefined(metrics),
        "num_correct": num_correct(metrics),
        "known": known,
        "known_share": share(sum(known.values()), metrics["samples"] * len(known)),
    }


def num_correct(metrics: Mapping[str, Any]) -> int | None:
    """Count the images whose class was predicted; None for images with several labels."""
    if metrics["task"] == "multilabel":
        return None
    return int(np.trace(metrics["confusion_matrix"]))


def _tiles(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The headline: what, its value, what it is of."""
    measures, macro, labels = MEASURES[metrics["task"]], metrics["macro"], len(metrics["classes"])
    if metrics["task"] == "multilabel":
        return [
            (
                label,
                number(macro[measure]),
                f"mean of {metrics['macro_labels'][measure]} of {labels} labels, "
                "each counted alike",
            )
            for measure, label in measures.items()
        ]
    right = f"{count(num_correct(metrics))} of {count(metrics['samples'])} images correct"
    if within := interval(metrics):
        right += f"; 95 % interval {percent(within[0])} to {percent(within[1])}"
    means = [
        (label, number(macro[measure]), f"mean of {labels} classes, each counted alike")
        for measure, label in measures.items()
    ]
    return [("Accuracy", percent(metrics["accuracy"]), right), *means]


def interval(metrics: Mapping[str, Any]) -> tuple[float, float] | None:
    """Compute the 95 % interval of the accuracy for images taken as independent (Wilson 1927)."""
    n, z = metrics["samples"], 1.959964
    if not n:
        return None
    p = (num_correct(metrics) or 0) / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _undefined(metrics: Mapping[str, Any]) -> list[str]:
    """Say of each undefined number of the page why it is one."""
    reasons = []
    if metrics["task"] == "multiclass" and metrics["accuracy"] is None:
        reasons.append("Accuracy: there are no images.")
    measures = MEASURES[metrics["task"]]
    for measure, label in measures.items():
        without = [
            name
            for name, values in metrics["classes"].items()
            if values[measure] is None and not _has_reason(values, measure)
        ]
        if without:
            reasons.append(f"{label} of {', '.join(without)}: {NEEDS[measure]}.")
    several = metrics["task"] == "multilabel"
    reasons += [
        f"{name}: {values['reason']}."
        for name, values in metrics["classes"].items()
        if values.get("reason")
    ]
    reasons += [
        f"Mean {label}: it needs the number of {'a label' if several else 'every class'}."
        for measure, label in measures.items()
        if metrics["macro"][measure] is None
    ]
    return reasons


def _has_reason(values: Mapping[str, Any], measure: str) -> bool:
    """Whether the reason of a label says why it lacks a score."""
    ranking = measure in ("auroc", "average_precision")
    return bool(values.get("reason")) and (ranking or not values["known"])


def check_same_evaluation(
    run: RunDirectory, split: str, metrics: Mapping[str, Any], samples: Sequence[Sample]
) -> None:
    """Refuse metrics that are not those of the predictions beside them.

    Compared is what follows from counts: the confusion matrix; of several labels the images of
    each and their recall.

    Raises:
        CxrdistError: they differ.
    """
    several = metrics["task"] == "multilabel"
    if samples and list(samples[0].logits) != list(metrics["classes"]):
        raise CxrdistError(
            f"{run.metrics(split)}: expected the classes of predictions.csv beside it; run "
            f"`cxrdist evaluate {options_of(split)}` again"
        )
    same = _same_labels(metrics, samples) if several else _same_confusion(metrics, samples)
    if not same:
        what = "counts of the labels" if several else "confusion matrices"
        raise CxrdistError(
            f"{run.metrics(split)}: expected the metrics of predictions.csv beside it, but the "
            f"{what} differ; run `cxrdist evaluate {options_of(split)}` again"
        )


def _same_confusion(metrics: Mapping[str, Any], samples: Sequence[Sample]) -> bool:
    classes = list(metrics["classes"])
    counted = {(label, predicted): 0 for label in classes for predicted in classes}
    for sample in samples:
        pair = sample.labels[0], sample.predicted[0]
        counted[pair] = counted.get(pair, 0) + 1
    return list(counted.values()) == [n for row in metrics["confusion_matrix"] for n in row]


def _same_labels(metrics: Mapping[str, Any], samples: Sequence[Sample]) -> bool:
    for name, scores in metrics["classes"].items():
        having = [sample for sample in samples if name in sample.labels]
        known = sum(sample.knows(name) for sample in samples)
        if known_images(metrics, name) != known:
            return False
        found = sum(name in sample.predicted for sample in having)
        recall = found / len(having) if having else None
        if scores["positives"] != len(having) or (recall is None) != (scores["recall"] is None):
            return False
        if recall is not None and abs(recall - scores["recall"]) > _DIGITS:
            return False
    return len(samples) == metrics["samples"]


def known_images(metrics: Mapping[str, Any], name: str) -> int:
    """Count the images of which a label is known; of metrics of older versions, all."""
    return int(metrics["classes"][name].get("known", metrics["samples"]))


def roc_charts(
    element: str, samples: Sequence[Sample], metrics: Mapping[str, Any]
) -> list[tuple[str, int, Markup | None]]:
    """Draw each class against the rest: name, number of its images, chart (None if undefined).

    Of a label the images count of which it is known.
    """
    charts = []
    for place, name in enumerate(metrics["classes"]):
        known = [sample for sample in samples if sample.knows(name)]
        is_class = np.array([name in sample.labels for sample in known])
        score = np.array([sample.logits[name] for sample in known])
        num_images = int(is_class.sum())
        chart = None
        if 0 < num_images < len(known):
            chart = Markup(pictures.roc_chart(f"{element}-roc{place}", is_class, score))
        charts.append((name, num_images, chart))
    return charts
