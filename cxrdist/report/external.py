"""What the report shows of external sets beside the run's own test images."""

from collections.abc import Mapping, Sequence
from typing import Any

from cxrdist.evaluate.metrics import ExternalInfo, Metrics, headline_means
from cxrdist.report.scores import known_images
from cxrdist.report.values import DASH, count, interval, number
from cxrdist.report.view import SplitView, View

COLUMNS = {
    "accuracy": "Accuracy",
    "auroc": "AUROC",
    "recall": "Sensitivity (recall)",
    "specificity": "Specificity",
}


Evaluated = tuple[SplitView, Metrics]
"""A set and its metrics, whose member `external` the run's own test images lack."""


def external_view(splits: Sequence[SplitView]) -> View | None:
    """Gather the results of external sets beside those of the run's own test images.

    Returns:
        The values for the page; None if no external set was evaluated.
    """
    shown: list[Evaluated] = [
        (split, metrics)
        for split in splits
        if (metrics := split["metrics"]) and (split["subset"] == "test" or "external" in metrics)
    ]
    sets = [
        _provenance(split, metrics, metrics["external"])
        for split, metrics in shown
        if "external" in metrics
    ]
    if not sets:
        return None
    task = shown[0][1]["task"]
    columns = {n: label for n, label in COLUMNS.items() if n != "accuracy" or task == "multiclass"}
    return {
        "columns": list(columns.values()),
        "rows": [_row(split, metrics, columns) for split, metrics in shown],
        "classes": _class_rows(shown),
        "sets": sets,
    }


def _row(split: SplitView, metrics: Metrics, columns: Mapping[str, str]) -> View:
    """Write the row of a set: images, patients, seen images, and means over its classes."""
    intervals, external = metrics.get("intervals"), metrics.get("external")
    means = headline_means(metrics)
    num_classes = sum(not scores.get("too_few") for scores in metrics["classes"].values())
    scores = [
        _with_interval(means, name) if num_classes else ("too few to say", "")
        for name in columns
        if name != "accuracy"
    ]
    accuracy = [_with_interval(metrics, "accuracy")] if "accuracy" in columns else []
    return {
        **_named(split, metrics),
        "num_classes": num_classes,
        "images": count(metrics["samples"]),
        "patients": count(intervals["patients"] if intervals else None),
        "seen": _seen(external) if external else "split by patient",
        "scores": [*accuracy, *scores],
    }


def _named(split: SplitView, metrics: Metrics) -> View:
    external = metrics.get("external")
    return {
        "name": external["name"] if external else split["name"],
        "element": split["element"],
        "kind": "external" if external else "internal",
    }


def _seen(external: ExternalInfo) -> str:
    """Write how many images the network has seen, and whether they are scored."""
    if external.get("not_known"):
        return "not known"
    done = "left out" if external["seen"] == "drop" else "scored"
    return f"{count(external['seen_images'])} of {count(external['images'])}, {done}"


def _class_rows(shown: Sequence[Evaluated]) -> list[View]:
    """Write a row per class and set, for the classes that the set has."""
    rows: list[View] = []
    for i, name in enumerate(shown[0][1]["classes"]):
        for split, metrics in shown:
            if "external" in metrics and name not in metrics["external"]["classes"]:
                continue
            scores = metrics["classes"][name]
            positives = scores.get("positives")
            # Older versions counted the images of a class in the confusion matrix only.
            if positives is None and metrics["task"] == "multiclass":
                positives = sum(metrics["confusion_matrix"][i])
            rows.append(
                {
                    "class": name,
                    **_named(split, metrics),
                    "images": f"{count(positives)} of {count(known_images(metrics, name))}",
                    "scores": [
                        _with_interval(scores, score)
                        for score in ("recall", "specificity", "auroc")
                    ],
                }
            )
    return rows


def _with_interval(scores: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Return a score, and its interval in words."""
    value, limits = scores.get(name), scores.get(f"{name}_interval")
    return number(value), "" if value is None else interval(limits, nothing="no interval")


def _provenance(split: SplitView, metrics: Metrics, external: ExternalInfo) -> View:
    """Gather the facts about an external set that its scores depend on."""
    return {
        **external,
        **_named(split, metrics),
        "subset": split["subset"],
        "index_sha256": metrics.get("index_sha256", DASH),
        "split": metrics.get("split", DASH),
        "not_known": external.get("not_known"),
        "lacking": [name for name in metrics["classes"] if name not in external["classes"]],
    }
