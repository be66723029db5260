"""The verdict: the one figure with its interval, and all that must be known to judge it."""

from collections.abc import Mapping, Sequence
from typing import Any

from cxrdist.evaluate.metrics import few_of
from cxrdist.report.scores import TOO_FEW, interval
from cxrdist.report.values import count, number, percent


def verdict_view(split: Mapping[str, Any]) -> dict[str, Any]:
    """Gather the figure of a split, its interval, and of how many images and patients it is.

    Args:
        split: what `split_view` gathers, of a split that was evaluated.
    """
    metrics = split["metrics"]
    figure = _accuracy if metrics["task"] == "multiclass" else _mean_auroc
    return {
        "several": metrics["task"] == "multilabel",
        "few": {},
        "too_few": TOO_FEW,
        **figure(metrics),
        "split": split["name"],
        "images": count(metrics["samples"]),
        "patients": _patients(metrics, split["samples"]),
    }


def _accuracy(metrics: Mapping[str, Any]) -> dict[str, Any]:
    if metrics["samples"] < metrics.get("fewest", 0):
        return {"value": TOO_FEW, "interval": None}
    limits = interval(metrics)
    return {
        "value": percent(metrics["accuracy"]),
        "interval": limits and [percent(limit) for limit in limits],
    }


def _mean_auroc(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The mean over the labels of enough images, and of which there are too few."""
    few, classes = few_of(metrics), metrics["classes"]
    mean = metrics.get("macro_enough", metrics["macro"])
    limits = mean.get("auroc_interval")
    enough = [name for name in classes if name not in few]
    return {
        "value": TOO_FEW if few and mean["auroc"] is None else number(mean["auroc"]),
        "interval": limits and [number(limit) for limit in limits],
        "labels": count(sum(classes[name]["auroc"] is not None for name in enough)),
        "all_labels": count(len(classes)),
        "few": few,
    }


def _patients(metrics: Mapping[str, Any], samples: Sequence[Any] | None) -> str | None:
    """Count the patients of the images; None where predictions.csv is gone."""
    if "intervals" in metrics:
        return count(metrics["intervals"]["patients"])
    return None if samples is None else count(len({sample.patient for sample in samples}))


def baseline_lines(audit: Mapping[str, Any] | None) -> list[str]:
    """Say what is reached without looking at the lungs.

    Args:
        audit: what `audit_view` gathers; None without an audit.
    """
    shortcut = audit and audit["shortcut"]
    known = [(label, score) for label, score, _ in shortcut["rows"] if score] if shortcut else []
    if not known:
        return []
    label, (value, low, high) = max(known, key=lambda row: row[1][0])
    return [
        f"Size, border and brightness alone, without the lungs, tell {label} from the rest with "
        f"an AUROC of {value} (95 % interval {low} to {high}); no other class more easily."
    ]
