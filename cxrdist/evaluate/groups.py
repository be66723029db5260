"""Groups: how far the figures of a model differ between groups of patients, such as women and men.

Many differences are looked at, of which some are large by chance. The intervals of all of them are
widened together so that, where no group differs, all hold 0 in 95 of 100 data sets: the reach is a
quantile of the largest studentised difference of a bootstrap replicate (single-step max-T; Westfall
& Young 1993, chapter 2; Dudoit & van der Laan 2008, chapter 4), which knows that differences of the
same images go together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import rankdata

from cxrdist.bootstrap import LEVEL, Replicates, Values, interval
from cxrdist.data.labels import NEGATIVE, POSITIVE
from cxrdist.documents import Between, Text
from cxrdist.evaluate.scored import Scored
from cxrdist.info import Count

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
Interval = Annotated[list[Share], Between(2, 2)]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class GroupScores(TypedDict):
    """A class or label in a group; None where a figure is undefined."""

    known: Count
    positives: Count
    auroc: Share | None
    auroc_interval: Interval | None
    recall: Share | None
    recall_interval: Interval | None
    specificity: Share | None
    specificity_interval: Interval | None
    recall_at_point: NotRequired[Share | None]
    """At the operating point that was chosen on the validation split."""
    recall_at_point_interval: NotRequired[Interval | None]
    specificity_at_point: NotRequired[Share | None]
    specificity_at_point_interval: NotRequired[Interval | None]
    too_few: list[str]
    """Figures that rest on too few patients; they are shown, and not compared."""


class Group(TypedDict):
    """The images of a group."""

    images: Count
    patients: Count
    accuracy: NotRequired[Share | None]
    accuracy_interval: NotRequired[Interval | None]
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
    reach: Annotated[float, Between(0, 1e6)]
    """Standard errors from a difference to the ends of its interval; 1.96 for a single one."""
    columns: dict[str, dict[str, Group]]
    gaps: list[Gap]
    """Flagged ones first, then the larger ones."""


@dataclass(frozen=True)
class _Figures:
    """One measure of the images of a group, for each of C classes, or once for the accuracy.

    Attributes:
        value: float64 [C], NaN where it is undefined.
        drawn: float64 [replicates, C].
        least_variance: float64 [C], which the bootstrap must not go below.
        enough: bool [C], whether it rests on enough patients.
    """

    value: Floats
    drawn: Floats
    least_variance: Floats
    enough: Bools


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
        largest: float64 [replicates], the largest studentised deviation of any pair.
    """

    column: str
    label: str | None
    measure: str
    groups: list[str]
    pairs: NDArray[np.int64]
    value: Floats
    error: Floats
    largest: Values


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
            name: _measure(scored, decisions, replicates, mask, fewest)
            for name, mask in members.items()
        }
        columns[column] = {
            name: _describe(scored, members[name], replicates, figures)
            for name, figures in found.items()
        }
        differences += _subtract(column, scored.classes, found)
    reach = _reach(differences)
    return {
        "fewest": fewest,
        "comparisons": sum(len(found.value) for found in differences),
        "reach": round(reach, 4),
        "columns": columns,
        "gaps": sorted(
            (_largest(found, reach) for found in differences),
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
    scored: Scored,
    decisions: Mapping[str, Bools],
    replicates: Replicates,
    mask: Bools,
    fewest: int,
) -> dict[str, _Figures]:
    """Compute all figures of the images in a mask [N], by measure."""
    columns, patient = np.unique(replicates.patient[mask], return_inverse=True)
    own = Replicates(np.ascontiguousarray(replicates.draws[:, columns]), patient)
    targets = scored.targets[mask]
    sides = {"recall": targets == POSITIVE, "specificity": targets == NEGATIVE}
    patients = {name: _count_patients(side, patient) for name, side in sides.items()}
    figures = {"auroc": _rank(scored.logits[mask], sides, own, patients, fewest)}
    for suffix, called in decisions.items():
        right = called[mask] == (targets == POSITIVE)
        for name, side in sides.items():
            figures[name + suffix] = _share(right & side, side, own, patients[name], fewest)
    if scored.task == "multiclass":
        right = decisions[""][mask] & sides["recall"]
        count = np.array([len(columns)])
        any_of_them = right.any(axis=1, keepdims=True)
        everything = np.ones_like(any_of_them)
        figures["accuracy"] = _share(any_of_them, everything, own, count, fewest)
    return figures


def _count_patients(side: Bools, patient: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count the patients with an image on a side, bool [n, C]: int64 [C]."""
    there = np.zeros((patient.max() + 1, side.shape[1]), np.bool_)
    rows, columns = np.nonzero(side)
    there[patient[rows], columns] = True
    return there.sum(axis=0)


def _share(
    part: Bools, whole: Bools, own: Replicates, patients: NDArray[np.int64], fewest: int
) -> _Figures:
    """The shares of images that are in `part` among those in `whole`, bool [n, C] each."""
    size = whole.shape[1]
    sums = own.sums(np.hstack([part, whole]).astype(np.float64))
    images = whole.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = part.sum(axis=0) / images
        drawn = sums[:, :size] / sums[:, size:]
    return _Figures(value, drawn, _least_variance(value, images, patients), patients >= fewest)


def _least_variance(
    value: Floats, images: NDArray[np.int64], patients: NDArray[np.int64]
) -> Floats:
    """The variance of a share of independent images with one success and one failure more.

    A few images that are all right have no spread, and are no proof (Agresti & Caffo 2000). Then
    nothing tells how alike the images of a patient are, and each patient counts once.
    """
    count = np.where((value == 0) | (value == 1), patients, images)
    smooth = (value * count + 1) / (count + 2)
    return smooth * (1 - smooth) / (count + 2)


def _rank(
    logits: Floats,
    sides: Mapping[str, Bools],
    own: Replicates,
    patients: Mapping[str, NDArray[np.int64]],
    fewest: int,
) -> _Figures:
    """The AUROC of each class.

    A replicate's is that of all images, moved by what each of them contributes (its placement;
    DeLong et al. 1988, for patients with several images Obuchowski 1997) on the scale of log odds,
    on which it stays within 0 and 1 (Pepe 2003, section 5.2.3): one product of matrices instead of
    thousands of sorts.
    """
    columns = zip(logits.T, sides["recall"].T, sides["specificity"].T, strict=True)
    found = [_placements(*column) for column in columns]
    value = np.array([auroc for auroc, _ in found])
    moves = own.sums(np.stack([moves for _, moves in found], axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = expit(logit(value) + moves / (value * (1 - value)))
    edge = (value == 0) | (value == 1)
    drawn[:, edge] = value[edge]
    positives, negatives = patients["recall"], patients["specificity"]
    least = _least_variance(value, sides["recall"].sum(axis=0), np.minimum(positives, negatives))
    # Of values that are none of the ends placements tell the spread themselves.
    return _Figures(
        value,
        drawn,
        np.where(edge, least, 0.0),
        (positives >= fewest) & (negatives >= fewest),
    )


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
    ranks[known] = rankdata(scores[known])
    above = (ranks[positive] - rankdata(scores[positive])) / num_negatives
    below = 1 - (ranks[negative] - rankdata(scores[negative])) / num_positives
    auroc = float(above.mean())
    moves[positive] = (above - auroc) / num_positives
    moves[negative] = (below - auroc) / num_negatives
    return auroc, moves


def _describe(
    scored: Scored, mask: Bools, replicates: Replicates, figures: Mapping[str, _Figures]
) -> Group:
    """Write the figures of a group as metrics.json has them."""
    targets = scored.targets[mask]
    positives = (targets == POSITIVE).sum(axis=0)
    known = (targets >= 0).sum(axis=0)
    of_classes = {name: found for name, found in figures.items() if name != "accuracy"}
    group: dict[str, Any] = {
        "images": int(mask.sum()),
        "patients": len(np.unique(replicates.patient[mask])),
        "too_few": [],
        "classes": {
            name: {"known": int(known[i]), "positives": int(positives[i]), **_row(of_classes, i)}
            for i, name in enumerate(scored.classes)
        },
    }
    if "accuracy" in figures:
        group |= _row({"accuracy": figures["accuracy"]}, 0)
    return group  # type: ignore[return-value]


def _row(figures: Mapping[str, _Figures], place: int) -> dict[str, Any]:
    """The figures of one class with their intervals, and which rest on too few patients."""
    row: dict[str, Any] = {}
    too_few = []
    for measure, found in figures.items():
        value = float(found.value[place])
        defined = np.isfinite(value)
        row[measure] = round(value, _DIGITS) if defined else None
        row[f"{measure}_interval"] = interval(found.drawn[:, place]) if defined else None
        if defined and not found.enough[place]:
            too_few.append(measure)
    return {**row, "too_few": too_few}


def _subtract(
    column: str, classes: Sequence[str], found: Mapping[str, Mapping[str, _Figures]]
) -> Iterator[_Differences]:
    """Compare all pairs of the groups of a column that have enough patients, figure by figure."""
    names = [name for name in found if name not in (OTHERS, UNKNOWN)]
    for measure in next(iter(found.values())):
        labels = [None] if measure == "accuracy" else classes
        for place, label in enumerate(labels):
            groups = [name for name in names if found[name][measure].enough[place]]
            if len(groups) < 2:
                continue
            figures = [found[name][measure] for name in groups]
            yield _Differences(column, label, measure, groups, *_pairwise(figures, place))


def _pairwise(
    figures: Sequence[_Figures], place: int
) -> tuple[NDArray[np.int64], Floats, Floats, Values]:
    """Pairs, differences, standard errors and largest deviations, as `_Differences` has them."""
    pairs = np.stack(np.triu_indices(len(figures), 1))
    first, second = pairs
    value = np.array([found.value[place] for found in figures])
    drawn = np.stack([found.drawn[:, place] for found in figures], axis=1)
    least = np.array([found.least_variance[place] for found in figures])
    missing = np.maximum(0, least - np.nanvar(drawn, axis=0))
    difference = value[first] - value[second]
    deviations = drawn[:, first] - drawn[:, second] - difference
    error = np.sqrt(np.nanvar(deviations, axis=0) + missing[first] + missing[second])
    # A replicate without a group's patients of a class, which is rare, says nothing of it.
    largest = np.nan_to_num(np.abs(deviations) / error).max(axis=1)
    return pairs, difference, error, largest


def _reach(differences: Sequence[_Differences]) -> float:
    """How many standard errors the largest deviation of all stays within; 0 without any."""
    if not differences:
        return 0.0
    largest = np.max([found.largest for found in differences], axis=0)
    return float(np.quantile(largest, LEVEL))


def _largest(found: _Differences, reach: float) -> Gap:
    """The largest difference of those that are flagged, else of all."""
    sizes = np.abs(found.value)
    flagged = sizes > reach * found.error
    place = int(np.argmax(np.where(flagged, sizes + 1, sizes)))
    first, second = found.pairs[:, place]
    if found.value[place] < 0:
        first, second = second, first
    ends = sizes[place] + reach * found.error[place] * np.array([-1, 1])
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
