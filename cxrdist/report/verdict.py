"""The verdict: the main figure with its interval, and what is needed to judge it."""

from collections.abc import Sequence

from cxrdist.data.audit_file import Shortcut
from cxrdist.evaluate.metrics import Metrics, few_of, headline_means
from cxrdist.evaluate.scored import Prediction
from cxrdist.report.audit import AuditView
from cxrdist.report.groups import MEASURES
from cxrdist.report.scores import TOO_FEW, accuracy_interval
from cxrdist.report.values import count, counted, interval, number, percent
from cxrdist.report.view import SplitView, Verdict

MOST_GAPS = 5  # in the verdict; the table has all


def verdict_view(split: SplitView) -> Verdict:
    """Gather the main figure of a split, its interval, and the numbers of images and patients.

    Raises:
        ValueError: the split was not evaluated.
    """
    metrics = split["metrics"]
    if metrics is None:
        raise ValueError(f"{split['subset']} was not evaluated")
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


def _accuracy(metrics: Metrics) -> Verdict:
    if metrics["samples"] < metrics.get("fewest", 0):
        return {"value": TOO_FEW, "interval": None}
    limits = accuracy_interval(metrics)
    return {
        "value": percent(metrics["accuracy"]),
        "interval": [percent(limit) for limit in limits] if limits else None,
    }


def _mean_auroc(metrics: Metrics) -> Verdict:
    """Return the mean over the labels with enough images, and the labels with too few."""
    few, classes = few_of(metrics), metrics["classes"]
    mean = headline_means(metrics)
    limits = mean.get("auroc_interval")
    enough = [name for name in classes if name not in few]
    return {
        "value": TOO_FEW if few and mean["auroc"] is None else number(mean["auroc"]),
        "interval": [number(limit) for limit in limits] if limits else None,
        "labels": count(sum(classes[name]["auroc"] is not None for name in enough)),
        "all_labels": count(len(classes)),
        "few": few,
    }


def _patients(metrics: Metrics, samples: Sequence[Prediction] | None) -> str | None:
    """Count the patients of the images; None if predictions.csv is missing."""
    if "intervals" in metrics:
        return counted(metrics["intervals"]["patients"], "patient")
    return None if samples is None else counted(len({s.patient for s in samples}), "patient")


def baseline_lines(audit: AuditView | None) -> list[str]:
    """Describe the scores of baselines without a deep network; empty without an audit."""
    if not audit:
        return []
    lines = []
    for what, figure, score in audit.trivial:
        several = figure == "mean_auroc"
        write = number if several else percent
        lines.append(
            f"For comparison, {what}, give "
            f"{'a mean AUROC' if several else 'an accuracy'} of {write(score['value'])} (95 % "
            f"interval {write(score['low'])} to {write(score['high'])}), cross-validated by "
            "patient over all images."
        )
    return lines or _shortcut_line(audit.content["shortcut"])


def _shortcut_line(shortcut: Shortcut | None) -> list[str]:
    """Describe the baseline in audits of older versions, which only have the AUROC per class."""
    scores = shortcut["auroc"] if shortcut else {}
    known = {label: score for label, score in scores.items() if score}
    if not known:
        return []
    label, score = max(known.items(), key=lambda item: item[1]["value"])
    return [
        f"Size, border and brightness alone, without the lungs, separate {label} from the rest "
        f"with an AUROC of {number(score['value'])} (95 % interval {number(score['low'])} to "
        f"{number(score['high'])}), the highest of all classes."
    ]


def gap_lines(metrics: Metrics) -> list[str]:
    """Describe the flagged differences between groups of patients."""
    groups = metrics.get("groups")
    gaps = [gap for gap in groups["gaps"] if gap["flagged"]] if groups else []
    lines = []
    for gap in gaps[:MOST_GAPS]:
        of_class = f" of {gap['label']}" if gap["label"] else ""
        lines.append(
            f"{MEASURES.get(gap['measure'], gap['measure'])}{of_class} differs by {gap['column']}: "
            f"{gap['lower']} is {number(gap['difference'])} below {gap['higher']} (95 % interval "
            f"{interval(gap['interval'])}, corrected for all comparisons)."
        )
    if len(gaps) > MOST_GAPS:
        lines.append(f"{count(len(gaps) - MOST_GAPS)} more such differences are listed below.")
    return lines


def external_lines(splits: Sequence[SplitView]) -> list[str]:
    """Describe the main figure of each external set in one line."""
    lines = []
    for split in splits:
        metrics = split["metrics"]
        external = metrics.get("external") if metrics else None
        if not metrics or not external:
            continue
        verdict = verdict_view(split)
        images = counted(metrics["samples"], "image")
        if verdict["patients"]:
            images += f" of {verdict['patients']}"
        if seen := seen_words(metrics):
            images += f" ({seen})"
        ends = verdict["interval"]
        within = f"95 % interval {ends[0]} to {ends[1]}" if ends else "no interval"
        if verdict["value"] == TOO_FEW:
            result = f"{TOO_FEW} ({images})"
        elif verdict["several"]:
            result = f"mean AUROC {verdict['value']} on {images}; {within}"
        else:
            result = f"right on {verdict['value']} of {images}; {within}"
        lines.append(f"External set {external['name']}: {result}.")
    return lines


def seen_words(metrics: Metrics | None) -> str:
    """Say how many scored images the network has seen; empty if none, or for the run's own set."""
    external = metrics.get("external") if metrics else None
    if not external:
        return ""
    if external.get("not_known"):
        return "it is unknown how many of them the network has seen"
    if external["seen"] == "drop" or not external["seen_images"]:
        return ""
    return f"the network has seen {count(external['seen_images'])} of them"
