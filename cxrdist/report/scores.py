"""What the report shows of the scores of a split, for one or several labels per image."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, product

import numpy as np
from markupsafe import Markup

from cxrdist.bootstrap import Limits
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.metrics import (
    INTERVALS,
    Metrics,
    ScoreName,
    Scores,
    correct_of,
    few_of,
    headline_means,
    list_few,
)
from cxrdist.evaluate.scored import Prediction
from cxrdist.intervals import wilson
from cxrdist.report import pictures
from cxrdist.report.values import (
    COUNTS,
    MEASURES,
    cell,
    count,
    counted,
    interval,
    number,
    percent,
    share,
)
from cxrdist.report.view import View
from cxrdist.run import RunDirectory, options_of

NEEDS: dict[ScoreName, str] = {
    "recall": "it needs an image of this class",
    "specificity": "it needs an image of another class",
    "precision": "it needs an image predicted as this",
    "f1": "it needs an image of this class or one predicted as it",
    "auroc": "it needs images of this class and of others",
    "average_precision": "it needs images of this class and of others",
}
TOO_FEW = "too few to say"
_DIGITS = 1e-6  # precision of a score in metrics.json

Cell = tuple[str, str]  # text of a table cell, and the small text below it


def score_view(metrics: Metrics) -> View:
    """Gather the values for the scores: names, tiles, table rows, reasons."""
    known = {name: known_images(metrics, name) for name in metrics["classes"]}
    return {
        "tiles": _tiles(metrics),
        "table": _table(metrics),
        "basis": _basis(metrics),
        "few": few_of(metrics),
        "undefined": _undefined(metrics),
        "within": {n: interval(v.get("auroc_interval")) for n, v in metrics["classes"].items()},
        "known": known,
        "known_share": share(sum(known.values()), metrics["samples"] * len(known)),
    }


def _measures(metrics: Metrics) -> dict[ScoreName, str]:
    """Return the existing scores with their titles; older versions have fewer."""
    measures = MEASURES[metrics["task"]]
    return {name: label for name, label in measures.items() if name in metrics["macro"]}


def _tiles(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Return the tiles of the headline: title, value, small text."""
    means = [_mean_tile(metrics, name, label) for name, label in _measures(metrics).items()]
    return means if metrics["task"] == "multilabel" else [_accuracy_tile(metrics), *means]


def _accuracy_tile(metrics: Metrics) -> tuple[str, str, str]:
    samples = metrics["samples"]
    if samples < metrics.get("fewest", 0):
        return "Accuracy", TOO_FEW, counted(samples, "image")
    more = f"{count(correct_of(metrics))} of {counted(samples, 'image')} correct"
    if limits := accuracy_interval(metrics):
        more += f"; 95 % interval {interval(limits, 'percent')}"
    if "intervals" in metrics:
        more += f", {counted(metrics['intervals']['patients'], 'patient')}"
    return "Accuracy", percent(metrics["accuracy"]), more


def _mean_tile(metrics: Metrics, measure: ScoreName, label: str) -> tuple[str, str, str]:
    """Return the tile of the mean of a score over the classes with enough images."""
    several, few = metrics["task"] == "multilabel", few_of(metrics)
    mean, classes = headline_means(metrics), metrics["classes"]
    number_of = sum(v[measure] is not None for name, v in classes.items() if name not in few)
    all_of_them = f"{len(classes)} {'labels' if several else 'classes'}"
    over = f"mean of {number_of} of {all_of_them}" if several or few else f"mean of {all_of_them}"
    more = f"{over}, equally weighted"
    if limits := mean.get(INTERVALS[measure]):
        more = f"95 % interval {interval(limits)}; {more}"
    if few:
        more += f"; too few to say for {list_few(metrics)}"
    value = TOO_FEW if few and mean[measure] is None else number(mean[measure])
    return label, value, more


def accuracy_interval(metrics: Metrics) -> Limits | None:
    """Return the 95 % interval of the accuracy; Wilson's for metrics of older versions."""
    if "accuracy_interval" in metrics:
        return metrics["accuracy_interval"]
    return wilson(correct_of(metrics), metrics["samples"]) if metrics["samples"] else None


def _basis(metrics: Metrics) -> str:
    """Describe how the intervals were computed."""
    if "intervals" not in metrics:
        return (
            "The interval (Wilson) treats the images as independent; with several images per "
            "patient the true one is wider. Run cxrdist evaluate again for intervals by patient."
            if metrics["task"] == "multiclass" and metrics["samples"]
            else ""
        )
    made = metrics["intervals"]
    alone = made["unit"] == "image"
    text = (
        f"95 % intervals by a bootstrap over {counted(made['patients'], 'patient')}"
        f"{', each with one image' if alone else ''}, with {count(made['replicates'])} replicates."
    )
    if within := metrics.get("accuracy_wilson"):
        text += (
            f" Wilson's interval of the accuracy, which treats the {count(metrics['samples'])} "
            f"images as independent, is {interval(within, 'percent')}."
        )
    return text


def _table(metrics: Metrics) -> View:
    """Return the table of classes: column titles, a row per class, rows of the mean."""
    measures, classes = _measures(metrics), metrics["classes"]
    several, few = metrics["task"] == "multilabel", few_of(metrics)
    first = next(iter(classes.values()))
    counts = {
        title: names for title, names in COUNTS.items() if names[0] in first and names[1] in first
    }
    rows = [
        (
            (name, f"too few to say: {few[name]}" if name in few else ""),
            [
                *((count(v[part]), f"of {count(v[all_])}") for part, all_ in counts.values()),
                *(cell(v, measure) for measure in measures),
            ],
        )
        for name, v in classes.items()
    ]
    nothing: list[Cell] = [("", "")] * len(counts)
    means = [cell(metrics["macro"], measure) for measure in measures]
    foot = [("Mean" if several else "Mean of all classes", [*nothing, *means])]
    if several:
        labels = [(count(metrics["macro_labels"][measure]), "") for measure in measures]
        foot.append(("Labels in the mean", [*nothing, *labels]))
    return {"titles": [*counts, *measures.values()], "rows": rows, "foot": foot}


def _undefined(metrics: Metrics) -> list[str]:
    """Explain each undefined score."""
    reasons = []
    if metrics["task"] == "multiclass" and metrics["accuracy"] is None:
        reasons.append("Accuracy: there are no images.")
    measures = _measures(metrics)
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
        f"Mean {label}: it needs the value of {'a label' if several else 'every class'}."
        for measure, label in measures.items()
        if metrics["macro"][measure] is None
    ]
    return reasons


def _has_reason(values: Scores, measure: ScoreName) -> bool:
    """Return whether the reason of a label explains why it lacks a score."""
    ranking = measure in ("auroc", "average_precision")
    return bool(values.get("reason")) and (ranking or not values["known"])


def check_same_evaluation(
    run: RunDirectory, split: str, metrics: Metrics, samples: Sequence[Prediction]
) -> None:
    """Check that metrics.json and predictions.csv are of the same evaluation.

    Only counts are compared: the confusion matrix, or with several labels per image the images and
    the recall of each label.

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


def _same_confusion(metrics: Metrics, samples: Sequence[Prediction]) -> bool:
    pairs = product(metrics["classes"], repeat=2)
    counts = dict(zip(pairs, chain(*metrics["confusion_matrix"]), strict=True))
    return Counter(counts) == Counter((s.labels[0], s.predicted[0]) for s in samples)


def _same_labels(metrics: Metrics, samples: Sequence[Prediction]) -> bool:
    for name, scores in metrics["classes"].items():
        having = [sample for sample in samples if name in sample.labels]
        known = sum(sample.is_known(name) for sample in samples)
        if known_images(metrics, name) != known:
            return False
        hits = sum(name in sample.predicted for sample in having)
        recall, expected = scores["recall"], hits / len(having) if having else None
        if scores["positives"] != len(having) or (recall is None) != (expected is None):
            return False
        if recall is not None and expected is not None and abs(recall - expected) > _DIGITS:
            return False
    return len(samples) == metrics["samples"]


def known_images(metrics: Metrics, name: str) -> int:
    """Count the images for which a label is known; all images in metrics of older versions."""
    return int(metrics["classes"][name].get("known", metrics["samples"]))


def roc_charts(
    element: str, samples: Sequence[Prediction], metrics: Metrics
) -> list[tuple[str, int, Markup | None]]:
    """Draw the ROC curve of each class: name, number of positives, chart (None if undefined).

    A label is drawn over the images for which it is known.
    """
    charts = []
    for i, name in enumerate(metrics["classes"]):
        known = [sample for sample in samples if sample.is_known(name)]
        is_class = np.array([name in sample.labels for sample in known])
        score = np.array([sample.logits[name] for sample in known])
        num_images = int(is_class.sum())
        chart = None
        if 0 < num_images < len(known):
            chart = pictures.roc_chart(f"{element}-roc{i}", is_class, score)
        charts.append((name, num_images, chart))
    return charts
