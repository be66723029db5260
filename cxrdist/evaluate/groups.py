"""Groups: how far the figures of a model differ between groups of patients, such as women and men.

Many differences are looked at, of which some are large by chance. Their intervals are corrected for
all of them together, over columns, classes and figures, so that where no group differs at most 5 of
100 data sets have one that does not hold 0 (Bonferroni). Each is the difference and some standard
errors of its bootstrap replicates, as many as Welch's t-test with patients as its samples takes.

Simulated with two labels, two sexes, three sources and four bands of age, patients of 1 to 4
images with a correlation of 0.5: without a difference 7 of 200 data sets of 600 patients are
flagged, and 3 of 200 of 150 patients; a sensitivity of 0.6 and not 0.8 in one sex is flagged in 80
of 100 data sets of 600 patients, and in 99 of 100 of 1,000.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NotRequired, TypedDict, cast

import numpy as np
import scipy  # loads its parts on first use
from numpy.typing import NDArray
from scipy.special import expit, logit

from cxrdist.bootstrap import LEVEL, Limits, Replicates
from cxrdist.data.labels import NEGATIVE, POSITIVE
from cxrdist.documents import Between, Text
from cxrdist.evaluate.scored import Scored
from cxrdist.info import Count
from cxrdist.intervals import bounded

# Children apart, since their chests differ; then twenty years each, as Seyyed-Kalantari et al.
# (Nature Medicine 27, 2021, 2176) cut the ages of the public sets of chest X-rays.
AGE_BANDS = {0: "0-17", 18: "18-39", 40: "40-59", 60: "60-79", 80: "80+"}
OLDEST = 130  # years; what is more is a mistake or hides an age
UNKNOWN = "unknown"  # shown, and not compared
OTHERS = "others"  # of a column with more groups, all but the largest; shown, and not compared
MOST_GROUPS = 12
_DIGITS = 6
Share = Annotated[float, Between(0, 1)]
Difference = Annotated[float, Between(-1, 1)]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class GroupScores(TypedDict):
    """A class or label in a group; None where a figure is undefined."""

    known: Count
    positives: Count
    auroc: Share | None
    auroc_interval: Limits | None
    recall: Share | None
    recall_interval: Limits | None
    specificity: Share | None
    specificity_interval: Limits | None
    recall_at_point: NotRequired[Share | None]
    """At the operating point that was chosen on the validation split."""
    recall_at_point_interval: NotRequired[Limits | None]
    specificity_at_point: NotRequired[Share | None]
    specificity_at_point_interval: NotRequired[Limits | None]
    too_few: list[str]
    """Figures that rest on too few patients; they are shown, and not compared."""


class Group(TypedDict):
    """The images of a group."""

    images: Count
    patients: Count
    accuracy: NotRequired[Share | None]
    accuracy_interval: NotRequired[Limits | None]
    too_few: list[str]
    """accuracy, where it rests on too few patients."""
    classes: dict[str, GroupScores]


class Gap(TypedDict):
    """The largest difference of a figure between two groups of a column."""

    column: Text
    label: Text | None
    """The class; None for the accuracy."""
    measure: Text
    higher: Text
    """The group with the higher figure."""
    lower: Text
    difference: Share
    interval: Annotated[list[Difference], Between(2, 2)]
    """Corrected for all comparisons."""
    flagged: bool
    """Whether the interval is above 0."""
    groups: Count
    """Groups of the column that were compared."""


class Groups(TypedDict):
    """The part ``groups`` of metrics.json."""

    fewest: Count
    comparisons: Count
    """Differences between two groups that were looked at, for which the intervals are corrected."""
    columns: dict[str, dict[str, Group]]
    gaps: list[Gap]
    """Flagged ones first, then the larger ones."""


@dataclass(frozen=True)
class _Figures:
    """One measure of the images of a group, for each of C classes, or once for the accuracy.

    Attributes:
        value: float64 [C], NaN where it is undefined.
        drawn: float64 [replicates, C].
        images: int64 [C], on which it rests; of an AUROC the fewer ones of both sides.
        patients: int64 [C], likewise.
    """

    value: Floats
    drawn: Floats
    images: NDArray[np.int64]
    patients: NDArray[np.int64]


@dataclass(frozen=True)
class _Differences:
    """Those between all pairs of some groups in one figure of one class.

    Attributes:
        column: by which the groups are told apart.
        label: the class; None for the accuracy.
        measure: name of the figure.
        groups: names, of those with enough patients.
        pairs: int64 [2, pairs], places of the groups.
        value: float64 [pairs], of the first minus the second.
        error: float64 [pairs], standard errors.
        freedom: float64 [pairs], degrees of it in Welch's t-test.
    """

    column: str
    label: str | None
    measure: str
    groups: list[str]
    pairs: NDArray[np.int64]
    value: Floats
    error: Floats
    freedom: Floats


def compare_groups(
    scored: Scored,
    replicates: Replicates,
    fewest: int,
    thresholds: Mapping[str, float] | None = None,
) -> Groups:
    """Measure each group of each column, and the differences between groups.

    Args:
        scored: the images.
        replicates: of their patients.
        fewest: patients with the class, and without it, below which a figure is not compared.
        thresholds: logits from which on a class is called, by class; None if there are none.
    """
    decisions = _decide(scored, thresholds)
    columns: dict[str, dict[str, Group]] = {}
    differences: list[_Differences] = []
    for column, texts in scored.groups.items():
        members = split_groups(column, texts)
        if len(members) < 2:
            continue
        found = {
            name: _measure(scored, decisions, replicates, mask) for name, mask in members.items()
        }
        columns[column] = {
            name: _describe(scored, members[name], figures, fewest)
            for name, figures in found.items()
        }
        differences += _subtract(column, scored.classes, found, fewest)
    comparisons = sum(len(found.value) for found in differences)
    return {
        "fewest": fewest,
        "comparisons": comparisons,
        "columns": columns,
        "gaps": sorted(
            (_largest(found, comparisons) for found in differences),
            key=lambda gap: (not gap["flagged"], -gap["difference"]),
        ),
    }


def split_groups(column: str, texts: Sequence[str]) -> dict[str, Bools]:
    """Tell the groups of a column apart.

    Returns:
        bool [N] by the name of the group: bands of age in their order, else the largest first;
        `OTHERS` and `UNKNOWN` last.
    """
    names = [age_band(text) for text in texts] if column == "age" else texts
    values, places = np.unique([name or UNKNOWN for name in names], return_inverse=True)
    counts = np.bincount(places)
    known = [place for place in np.argsort(-counts, kind="stable") if values[place] != UNKNOWN]
    shown, others = known[:MOST_GROUPS], known[MOST_GROUPS:]
    if column == "age":
        order = list(AGE_BANDS.values())
        shown.sort(key=lambda place: order.index(str(values[place])))
    members = {str(values[place]): places == place for place in shown}
    if others:
        members[OTHERS] = np.isin(places, others)
    if UNKNOWN in values:
        members[UNKNOWN] = values[places] == UNKNOWN
    return members


def age_band(text: str) -> str:
    """Name the band of an age in years; empty for a text that is no age."""
    try:
        years = float(text)
    except ValueError:
        return ""
    if not 0 <= years <= OLDEST:
        return ""
    return AGE_BANDS[max(least for least in AGE_BANDS if least <= years)]


def _decide(scored: Scored, thresholds: Mapping[str, float] | None) -> dict[str, Bools]:
    """Which classes are called by each rule: bool [N, C]; as predicted, and at the points."""
    if scored.task == "multilabel":
        predicted = scored.logits >= 0  # probability 0.5
    else:
        best = scored.logits.argmax(axis=1)
        predicted = best[:, None] == np.arange(len(scored.classes))
    decisions = {"": predicted}
    if thresholds is not None and {*scored.classes} <= thresholds.keys():
        points = np.array([thresholds[name] for name in scored.classes])
        decisions["_at_point"] = scored.logits >= points
    return decisions


def _measure(
    scored: Scored, decisions: Mapping[str, Bools], replicates: Replicates, mask: Bools
) -> dict[str, _Figures]:
    """Compute all figures of the images in a mask [N], by measure."""
    columns, patient = np.unique(replicates.patient[mask], return_inverse=True)
    own = Replicates(replicates.draws.T[columns].T, patient)
    targets = scored.targets[mask]
    sides = {"recall": targets == POSITIVE, "specificity": targets == NEGATIVE}
    figures = {"auroc": _rank(scored.logits[mask], sides["recall"], sides["specificity"], own)}
    for suffix, called in decisions.items():
        right = called[mask] == (targets == POSITIVE)
        for name, side in sides.items():
            figures[name + suffix] = _share(right & side, side, own)
    if scored.task == "multiclass":
        right = (decisions[""][mask] & sides["recall"]).any(axis=1, keepdims=True)
        figures["accuracy"] = _share(right, np.ones_like(right), own)
    return figures


def _count_patients(side: Bools, patient: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count the patients with an image on a side, bool [n, C]: int64 [C]."""
    there = np.zeros((patient.max() + 1, side.shape[1]), np.bool_)
    rows, columns = np.nonzero(side)
    there[patient[rows], columns] = True
    return there.sum(axis=0)


def _share(part: Bools, whole: Bools, own: Replicates) -> _Figures:
    """Return the shares of images that are in `part` among those in `whole`, bool [n, C] each."""
    size = whole.shape[1]
    sums = own.sums(np.hstack([part, whole]).astype(np.float64))
    images, patients = whole.sum(axis=0), _count_patients(whole, own.patient)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = part.sum(axis=0) / images
        drawn = sums[:, :size] / sums[:, size:]
    return _Figures(value, drawn, images, patients)


def _rank(logits: Floats, positive: Bools, negative: Bools, own: Replicates) -> _Figures:
    """Return the AUROC of each class, from [n, C] each.

    A replicate's is that of all images, moved by what each of them contributes (its placement;
    DeLong et al. 1988, for patients with several images Obuchowski 1997) on the scale of log odds,
    on which it stays within 0 and 1 (Pepe 2003, section 5.2.3): one product of matrices instead of
    thousands of sorts.
    """
    columns = zip(logits.T, positive.T, negative.T, strict=True)
    found = [_placements(*column) for column in columns]
    value = np.array([auroc for auroc, _ in found])
    moves = own.sums(np.stack([moves for _, moves in found], axis=1))
    edge = (value == 0) | (value == 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = expit(logit(value) + moves / (value * (1 - value)))
    drawn[:, edge] = value[edge]
    images = np.minimum(positive.sum(axis=0), negative.sum(axis=0))
    patients = [_count_patients(side, own.patient) for side in (positive, negative)]
    return _Figures(value, drawn, images, np.minimum(*patients))


def _placements(scores: Floats, positive: Bools, negative: Bools) -> tuple[float, Floats]:
    """The AUROC of scores [n], and what each image contributes to its deviation, float64 [n].

    By ranks, as Sun & Xu 2014 compute what DeLong et al. define; ties count for half.
    """
    moves = np.zeros(len(scores))
    num_positives, num_negatives = int(positive.sum()), int(negative.sum())
    if not num_positives or not num_negatives:
        return float("nan"), moves
    known = positive | negative
    ranks = np.zeros(len(scores))
    ranks[known] = scipy.stats.rankdata(scores[known])
    above = (ranks[positive] - scipy.stats.rankdata(scores[positive])) / num_negatives
    below = 1 - (ranks[negative] - scipy.stats.rankdata(scores[negative])) / num_positives
    auroc = float(above.mean())
    moves[positive] = (above - auroc) / num_positives
    moves[negative] = (below - auroc) / num_negatives
    return auroc, moves


def _describe(scored: Scored, mask: Bools, figures: Mapping[str, _Figures], fewest: int) -> Group:
    """Write the figures of a group as metrics.json has them."""
    targets = scored.targets[mask]
    positives = (targets == POSITIVE).sum(axis=0)
    known = (targets >= 0).sum(axis=0)
    of_classes = {name: found for name, found in figures.items() if name != "accuracy"}
    group: dict[str, object] = {
        "images": int(mask.sum()),
        "patients": len({scored.patients[place] for place in np.flatnonzero(mask)}),
        "too_few": [],
        "classes": {
            name: {
                "known": int(known[i]),
                "positives": int(positives[i]),
                **_row(of_classes, i, fewest),
            }
            for i, name in enumerate(scored.classes)
        },
    }
    if "accuracy" in figures:
        group |= _row({"accuracy": figures["accuracy"]}, 0, fewest)
    return cast(Group, group)


def _row(figures: Mapping[str, _Figures], column: int, fewest: int) -> dict[str, object]:
    """Write the figures of one class with their intervals, and which rest on too few patients."""
    row: dict[str, object] = {}
    too_few = []
    for measure, found in figures.items():
        value = float(found.value[column])
        defined = np.isfinite(value)
        row[measure] = round(value, _DIGITS) if defined else None
        patients = int(found.patients[column])
        drawn = found.drawn[:, column]
        row[f"{measure}_interval"] = bounded(value, drawn, patients) if defined else None
        if defined and patients < fewest:
            too_few.append(measure)
    return {**row, "too_few": too_few}


def _subtract(
    column: str,
    classes: Sequence[str],
    found: Mapping[str, Mapping[str, _Figures]],
    fewest: int,
) -> Iterator[_Differences]:
    """Compare all pairs of the groups of a column that have enough patients, figure by figure."""
    names = [name for name in found if name not in (OTHERS, UNKNOWN)]
    for measure in next(iter(found.values())):
        labels = [None] if measure == "accuracy" else classes
        for place, label in enumerate(labels):
            groups = [name for name in names if found[name][measure].patients[place] >= fewest]
            if len(groups) < 2:
                continue
            figures = [found[name][measure] for name in groups]
            yield _Differences(column, label, measure, groups, *_pairwise(figures, place, measure))


def _pairwise(
    figures: Sequence[_Figures], place: int, measure: str
) -> tuple[NDArray[np.int64], Floats, Floats, Floats]:
    """Pairs, differences, standard errors and degrees of freedom, as `_Differences` has them."""
    pairs = np.stack(np.triu_indices(len(figures), 1))
    value = np.array([found.value[place] for found in figures])[pairs]
    drawn = np.stack([found.drawn[:, place] for found in figures], axis=1)
    images = np.array([found.images[place] for found in figures])[pairs]
    patients = np.array([found.patients[place] for found in figures])[pairs]
    # A replicate without a group's patients of a class, which is rare, says nothing of it.
    alone = np.nanvar(drawn, axis=0)[pairs]
    # Groups may share patients, such as those with images of two views.
    both = np.nanvar(drawn[:, pairs[0]] - drawn[:, pairs[1]], axis=0)
    # Half an image more on each side, so that of two faultless groups nothing is certain.
    pooled = ((value * images).sum(axis=0) + 0.5) / (images.sum(axis=0) + 1)
    # Where all images are right nothing tells how alike those of a patient are.
    count = np.where((value == 0) | (value == 1), patients, images)
    variance = np.maximum(alone, _spread(measure, pooled) / count)
    error = np.sqrt(both + (variance - alone).sum(axis=0))
    freedom = variance.sum(axis=0) ** 2 / (variance**2 / (patients - 1)).sum(axis=0)
    return pairs, value[0] - value[1], error, freedom


def _spread(measure: str, value: Floats) -> Floats:
    """The variance of what one image adds to a figure, if it has the value that both groups share.

    No group's error is below it: a few images that are all right have no spread of their own, and
    are no proof. So a score test does for shares (Newcombe 1998, Statistics in Medicine 17, 857);
    of an AUROC it is that of placements of exponential scores (Hanley & McNeil 1982).
    """
    if measure == "auroc":
        return np.minimum(value / (2 - value), 2 * value**2 / (1 + value)) - value**2
    return value * (1 - value)


def _largest(found: _Differences, comparisons: int) -> Gap:
    """Return the largest difference of those that are flagged, else of all."""
    sizes = np.abs(found.value)
    reach = found.error * scipy.stats.t.ppf(1 - (1 - LEVEL) / 2 / comparisons, found.freedom)
    flagged = sizes > reach
    place = int(np.argmax(np.where(flagged, sizes + 1, sizes)))
    first, second = found.pairs[:, place]
    if found.value[place] < 0:
        first, second = second, first
    ends = sizes[place] + reach[place] * np.array([-1, 1])
    return {
        "column": found.column,
        "label": found.label,
        "measure": found.measure,
        "higher": found.groups[first],
        "lower": found.groups[second],
        "difference": round(float(sizes[place]), _DIGITS),
        "interval": [round(float(end), _DIGITS) for end in np.clip(ends, -1, 1)],
        "flagged": bool(flagged[place]),
        "groups": len(found.groups),
    }
