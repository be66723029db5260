"""External sets side by side with the run's own test images, as the report shows them."""

from collections.abc import Mapping, Sequence
from typing import Any

from cxrdist.report.scores import known_images
from cxrdist.report.values import DASH, count, number

COLUMNS = {
    "accuracy": "Accuracy",
    "auroc": "AUROC",
    "recall": "Sensitivity (recall)",
    "specificity": "Specificity",
}


def external_view(splits: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Gather the results of external sets beside those of the run's own test images.

    Args:
        splits: of `split_view`, all places of the run.

    Returns:
        What the page shows; None if no external set was evaluated.
    """
    shown = [s for s in splits if s["metrics"] and (s["place"] == "test" or _is_external(s))]
    sets = [split for split in shown if _is_external(split)]
    if not sets:
        return None
    task = sets[0]["metrics"]["task"]
    columns = {n: label for n, label in COLUMNS.items() if n != "accuracy" or task == "multiclass"}
    return {
        "columns": list(columns.values()),
        "rows": [_row(split, columns) for split in shown],
        "classes": _class_rows(shown),
        "sets": [_provenance(split) for split in sets],
    }


def _is_external(split: Mapping[str, Any]) -> bool:
    return "external" in (split["metrics"] or {})


def _row(split: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """One set: its images and patients, how many were seen, and means of its classes."""
    metrics = split["metrics"]
    about = metrics.get("external")
    means = metrics.get("macro_enough") or metrics["macro"]
    num_classes = sum(not scores.get("too_few") for scores in metrics["classes"].values())
    scores = [
        _with_interval(means, name) if num_classes else ("too few to say", "")
        for name in columns
        if name != "accuracy"
    ]
    accuracy = [_with_interval(metrics, "accuracy")] if "accuracy" in columns else []
    return {
        **_named(split),
        "num_classes": num_classes,
        "images": count(metrics["samples"]),
        "patients": count(metrics.get("intervals", {}).get("patients")),
        "seen": _seen(about) if about else "split by patient",
        "scores": [*accuracy, *scores],
    }


def _named(split: Mapping[str, Any]) -> dict[str, Any]:
    is_external = _is_external(split)
    return {
        "name": split["metrics"]["external"]["name"] if is_external else split["name"],
        "element": split["element"],
        "kind": "external" if is_external else "internal",
    }


def _seen(about: Mapping[str, Any]) -> str:
    """How many images the network has seen, and what was done with them."""
    if about.get("not_known"):
        return "not known"
    done = "left out" if about["seen"] == "drop" else "scored"
    return f"{count(about['seen_images'])} of {count(about['images'])}, {done}"


def _class_rows(splits: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The scores of each class that a set has, the sets of a class one below the other."""
    rows = []
    for place, name in enumerate(splits[0]["metrics"]["classes"]):
        for split in splits:
            metrics = split["metrics"]
            if name not in metrics.get("external", {}).get("classes", [name]):
                continue
            scores = metrics["classes"][name]
            positives = scores.get("positives")
            if positives is None and metrics["task"] == "multiclass":
                positives = sum(metrics["confusion_matrix"][place])
            rows.append(
                {
                    "class": name,
                    **_named(split),
                    "images": f"{count(positives)} of {count(known_images(metrics, name))}",
                    "scores": [
                        _with_interval(scores, score)
                        for score in ("recall", "specificity", "auroc")
                    ],
                }
            )
    return rows


def _with_interval(scores: Mapping[str, Any], name: str) -> tuple[str, str]:
    """A score, and its interval in words."""
    value, interval = scores.get(name), scores.get(f"{name}_interval")
    if value is None:
        return DASH, ""
    return number(value), (
        f"{number(interval[0])} to {number(interval[1])}" if interval else "no interval"
    )


def _provenance(split: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be known of an external set before its scores are read."""
    metrics, about = split["metrics"], split["metrics"]["external"]
    return {
        **_named(split),
        "place": split["place"],
        "index_sha256": metrics.get("index_sha256", DASH),
        "split": metrics.get("split", DASH),
        "not_known": about.get("not_known"),
        "seen": about["seen"],
        "seen_images": count(about["seen_images"]),
        "images": count(about["images"]),
        "reasons": [(why, count(times)) for why, times in about["reasons"].items()],
        "patients_told": count(about["patients_told"]),
        "label_map": about["label_map"],
        "other_classes": [(n, count(times)) for n, times in about["other_classes"].items()],
        "lacking": [name for name in metrics["classes"] if name not in about["classes"]],
    }
