"""The verdict: the one figure with its interval, and all that must be known to judge it."""

from collections.abc import Mapping, Sequence
from typing import Any

from cxrdist.report.values import count, number, percent


def verdict_view(split: Mapping[str, Any]) -> dict[str, Any]:
    """Gather the figure of a split, its interval, and of how many images and patients it is.

    Args:
        split: what `split_view` gathers, of a split that was evaluated.
    """
    metrics = split["metrics"]
    return {
        **_figure(metrics),
        "split": split["name"],
        "images": count(metrics["samples"]),
        "patients": _patients(metrics, split["samples"]),
        "intervals": metrics.get("intervals"),
    }


def _figure(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The figure of the task and its interval, None in evaluations of older versions."""
    if metrics["task"] == "multiclass":
        value, limits = metrics["accuracy"], metrics.get("accuracy_interval")
        return {
            "several": False,
            "value": percent(value),
            "interval": limits and [percent(limit) for limit in limits],
        }
    limits = metrics["macro"].get("auroc_interval")
    return {
        "several": True,
        "value": number(metrics["macro"]["auroc"]),
        "interval": limits and [number(limit) for limit in limits],
        "labels": count(metrics["macro_labels"]["auroc"]),
        "all_labels": count(len(metrics["classes"])),
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
