"""Comparison of two models on the same images: the differences of all figures with intervals.

Both use the same draws of patients, so that the difficulty of the images cancels out.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from cxrdist.bootstrap import ALIKE, Limits, Replicates
from cxrdist.data.labels import POSITIVE
from cxrdist.documents import Real, Share, Text
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.delong import DeLong, compare_aurocs
from cxrdist.evaluate.measure import Settings, replicate
from cxrdist.evaluate.scored import Scored
from cxrdist.evaluate.scores import too_few
from cxrdist.info import Count, Task
from cxrdist.intervals import QUANTILE, Intervals, describe, wilson

FIGURES = ("auroc", "average_precision", "recall", "specificity", "precision", "f1")
METHOD = (
    "paired bootstrap over patients, drawn within the rarest class of each and the same for both; "
    "limits from the standard error of the differences times sqrt(n / (n - 1)) and t with n - 1 "
    "degrees of freedom, n the patients that the figure rests on, of AUROC those of its smaller "
    "side (Hesterberg 2015). Where no replicate differs from another: Wilson (1927) for none of n "
    "patients, to both sides. Means: the intervals of the classes and the correlation of their "
    "replicates (Zou 2007)"
)


class Difference(TypedDict):
    """One figure of both models; None where it is undefined."""

    a: Share | None
    b: Share | None
    difference: Real | None
    """b - a."""
    interval: Limits | None


class McNemar(TypedDict):
    """The exact test of McNemar (1947) by image; it treats images as independent."""

    only_a: Count
    """Images that only the first model predicts correctly."""
    only_b: Count
    p_value: Share
    """Two-sided, from the binomial distribution."""


class ClassComparison(TypedDict):
    """One class against the rest, or one label."""

    known: Count
    positives: Count
    patients: Count
    """Patients of the images for which the class is known."""
    too_few: Text | None
    """Which images are too few, such as ``3 positives``; None if there are enough."""
    figures: dict[str, Difference]
    mcnemar: McNemar
    delong: DeLong | None


class Statistics(TypedDict):
    """The differences between two models that follow from their predictions."""

    task: Task
    samples: Count
    intervals: Intervals
    fewest: Count
    accuracy: NotRequired[Difference]
    mcnemar: NotRequired[McNemar]
    """The test for the accuracy."""
    macro: dict[str, Difference]
    """Means over the classes with enough images."""
    macro_labels: dict[str, Count]
    """Number of classes in each mean."""
    classes: dict[str, ClassComparison]


class Comparison(Statistics):
    """The content of comparison.json."""

    format: Literal["cxrdist-comparison-1"]
    runs: dict[Literal["a", "b"], Text]
    """The two run directories, as given."""
    place: Text
    """test, val, train or external/NAME."""
    flipped: dict[str, Count]
    """Number of images (or labels of images) that the two decide differently, by kind of change."""
    recipe: list[Text] | None
    """Recipe fields that differ, - for a and + for b; None if a run has no recipe."""


Figures = Mapping[str, NDArray[np.float64]]  # by name, [replicates, classes]; NaN: undefined


class Both(NamedTuple):
    """The figures of both models."""

    observed: tuple[Figures, Figures]
    """For the images themselves: one replicate that has each patient once."""
    drawn: tuple[Figures, Figures]
    """For the replicates."""
    patients: Mapping[str, NDArray[np.int64]]
    """Number of patients behind each figure, by name, [classes]."""

    def classes_of_mean(self, name: str, enough: NDArray[np.bool_], task: str) -> NDArray[np.int64]:
        """Return the columns of the classes in the mean of a figure, as in `headline_means`.

        These are the classes with enough images for which both models have the figure; but if all
        of several classes have enough images, the mean is undefined unless all have the figure.
        """
        if task == "multiclass" and enough.all():
            return np.arange(len(enough))
        a, b = (figures[name][0] for figures in self.observed)
        return np.flatnonzero(enough & np.isfinite(a + b))

    def difference(self, name: str, columns: NDArray[np.int64]) -> Difference:
        """Compare the mean of one figure over some classes."""
        a, b = (figures[name][0, columns] for figures in self.observed)
        drawn_a, drawn_b = (figures[name][:, columns] for figures in self.drawn)
        means = [float(values.mean()) if len(columns) else np.nan for values in (a, b)]
        change = means[1] - means[0]
        limits = None
        if np.isfinite(change):
            reach = _reach(drawn_b - drawn_a, self.patients[name][columns])
            limits = [round(max(-1.0, change - reach), 6), round(min(1.0, change + reach), 6)]
        return {
            "a": round(means[0], 6) if np.isfinite(means[0]) else None,
            "b": round(means[1], 6) if np.isfinite(means[1]) else None,
            "difference": None if limits is None else round(change, 6),
            "interval": limits,
        }


def _reach(differences: NDArray[np.float64], patients: NDArray[np.int64]) -> float:
    """Return the half-width of the interval of the mean of K differences.

    Args:
        differences: float64 [replicates, K], NaN where a replicate lacks a figure.
        patients: int64 [K], number of patients behind each difference.
    """
    from scipy.stats import t

    # A replicate counts if it has all figures: one NaN would make their correlations NaN.
    complete = differences[np.isfinite(differences).all(axis=1)]
    spread = complete.std(axis=0, ddof=1) if len(complete) > 1 else np.zeros(len(patients))
    varies, freedom = (spread > ALIKE) & (patients > 1), np.maximum(patients - 1, 1)
    wide = spread * np.sqrt(patients / freedom) * t.ppf(QUANTILE, freedom)
    reaches = np.where(varies, wide, [wilson(0, max(1, n))[1] for n in patients.tolist()])
    # The correlation with a constant is NaN: differences that do not vary count as uncorrelated.
    correlation = np.eye(len(patients))
    if varies.any():
        correlation[np.ix_(varies, varies)] = np.corrcoef(complete[:, varies].T)
    return math.sqrt(max(0.0, float(reaches @ correlation @ reaches))) / len(patients)


def compare_scored(a: Scored, b: Scored, settings: Settings) -> Statistics:
    """Compare two models on the same images, in the same order (`aligned`)."""
    draws = replicate(a, settings)
    # Each patient once: the figures of the images come from the same code as the replicates.
    once = Replicates(np.ones((1, draws.draws.shape[1]), np.uint8), draws.patient)
    both = Both(
        observed=(_figures(a, once), _figures(b, once)),
        drawn=(_figures(a, draws), _figures(b, draws)),
        patients=_patients(a, b, draws),
    )
    classes = {
        name: _compare_class((a, b), column, both, draws, settings.fewest)
        for column, name in enumerate(a.classes)
    }
    enough = np.array([not of_class["too_few"] for of_class in classes.values()])
    means = {name: both.classes_of_mean(name, enough, a.task) for name in FIGURES}
    statistics: Statistics = {
        "task": "multilabel" if a.task == "multilabel" else "multiclass",
        "samples": len(a),
        "intervals": {**describe(draws), "method": METHOD},
        "fewest": settings.fewest,
        "macro": {name: both.difference(name, columns) for name, columns in means.items()},
        "macro_labels": {name: len(columns) for name, columns in means.items()},
        "classes": classes,
    }
    if a.task == "multiclass":
        # The accuracy is of all classes together, so its array has one column.
        statistics["accuracy"] = both.difference("accuracy", np.array([0]))
        statistics["mcnemar"] = _mcnemar(_is_right(a), _is_right(b))
    return statistics


def _is_right(scored: Scored) -> NDArray[np.bool_]:
    """Return whether the predicted class of each image is correct: bool [N], multiclass only."""
    return (scored.predicted & (scored.targets == POSITIVE)).any(axis=1)


def _figures(scored: Scored, draws: Replicates) -> Figures:
    """Return all figures of each replicate; NaN where one is undefined."""
    guess, truth, known = scored.predicted, scored.targets == POSITIVE, scored.targets >= 0
    cells = [guess & truth, guess & ~truth, ~guess & truth, ~guess & ~truth]
    counts = draws.sums(np.hstack([cell & known for cell in cells]).astype(np.float64))
    hits, alarms, misses, passes = np.split(counts, 4, axis=1)
    ranked = [
        draws.take(known[:, column]).ranking(
            scored.logits[known[:, column], column], truth[known[:, column], column]
        )
        for column in range(len(scored.classes))
    ]
    with np.errstate(invalid="ignore"):
        return {
            "auroc": np.stack([auroc for auroc, _ in ranked], 1),
            "average_precision": np.stack([average for _, average in ranked], 1),
            "recall": hits / (hits + misses),
            "specificity": passes / (passes + alarms),
            "precision": hits / (hits + alarms),
            "f1": 2 * hits / (2 * hits + alarms + misses),
            # Patients have different numbers of images, so that of a replicate varies.
            "accuracy": hits.sum(1, keepdims=True) / (hits + misses).sum(1, keepdims=True),
        }


def _patients(a: Scored, b: Scored, draws: Replicates) -> dict[str, NDArray[np.int64]]:
    """Count the patients behind each figure: by name, int64 [classes]."""
    truth, known = a.targets == POSITIVE, a.targets >= 0
    # A difference of precision rests on each image that either model calls.
    guess = a.predicted | b.predicted
    rests_on = {
        "recall": truth,
        "specificity": known & ~truth,
        "precision": known & guess,
        "f1": known & (truth | guess),
        "accuracy": known[:, :1],
    }
    counts = {
        name: np.array([draws.patients(column) for column in images.T])
        for name, images in rests_on.items()
    }
    counts["average_precision"] = counts["recall"]
    return counts | {"auroc": np.minimum(counts["recall"], counts["specificity"])}


def _compare_class(
    models: tuple[Scored, Scored], column: int, both: Both, draws: Replicates, fewest: int
) -> ClassComparison:
    a, b = models
    known = a.targets[:, column] >= 0
    truth = a.targets[known, column] == POSITIVE
    right = [scored.predicted[known, column] == truth for scored in (a, b)]
    scores = np.stack([scored.logits[known, column] for scored in (a, b)])
    positives = int(truth.sum())
    return {
        "known": len(truth),
        "positives": positives,
        "patients": draws.patients(known),
        "too_few": too_few(positives, len(truth) - positives, fewest),
        "figures": {name: both.difference(name, np.array([column])) for name in FIGURES},
        "mcnemar": _mcnemar(*right),
        "delong": compare_aurocs(scores, truth),
    }


def _mcnemar(a_right: NDArray[np.bool_], b_right: NDArray[np.bool_]) -> McNemar:
    """Test whether one model alone is right more often than the other alone."""
    from scipy.stats import binomtest

    only_a, only_b = int((a_right & ~b_right).sum()), int((b_right & ~a_right).sum())
    differing = only_a + only_b
    # SciPy refuses a test of 0 images, on which the models do not differ at all.
    p_value = float(binomtest(only_a, differing).pvalue) if differing else 1.0
    return {"only_a": only_a, "only_b": only_b, "p_value": p_value}


def aligned(a: Scored, b: Scored, names: tuple[str, str]) -> Scored:
    """Put the images and classes of the second model into the order of the first.

    Raises:
        CxrdistError: their images, classes, labels or patients differ.
    """
    if a.task != b.task or set(a.classes) != set(b.classes):
        raise CxrdistError(
            f"{names[1]}: has the classes {', '.join(b.classes)} ({b.task}), {names[0]} has "
            f"{', '.join(a.classes)} ({a.task}); compare runs of the same classes"
        )
    positions = {key: position for position, key in enumerate(b.keys)}
    alone = [set(a.keys) - set(b.keys), set(b.keys) - set(a.keys)]
    if alone[0] or alone[1]:
        owner, keys = (names[0], alone[0]) if alone[0] else (names[1], alone[1])
        raise CxrdistError(
            f"{owner}: was evaluated on {len(keys)} images that the other run was not, such as "
            f"{min(keys)}; evaluate both runs on the same shards"
        )
    columns = [b.classes.index(name) for name in a.classes]
    b = b.take(np.array([positions[key] for key in a.keys], np.int64))
    targets, logits = b.targets[:, columns], b.logits[:, columns]
    for what, differs in (
        ("label", (targets != a.targets).any(axis=1)),
        ("patient", np.array(a.patients) != np.array(b.patients)),
    ):
        if differs.any():
            raise CxrdistError(
                f"{names[1]}: the {what} of {int(differs.sum())} images differs from that in "
                f"{names[0]}, for example for {a.keys[int(differs.argmax())]}; evaluate both runs "
                "on the same shards"
            )
    return Scored(a.task, a.classes, a.keys, a.patients, targets, logits, a.groups)
