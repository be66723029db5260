"""Groups: differences in the figures of a model between patient groups, such as women and men.

Some of the many differences are large by chance. Their intervals are therefore corrected for all
comparisons together, over columns, classes and figures: if no group differs, at most 5 of 100 data
sets have an interval that excludes 0 (Bonferroni). An interval is the difference plus and minus a
multiple of its bootstrap standard error, the multiple of Welch's t-test with patients as samples.

Simulated with two labels, two sexes, three sources and four age bands, patients with 1 to 4 images
and a correlation of 0.5: without a difference 7 of 200 data sets with 600 patients are flagged, and
3 of 200 with 150 patients. A sensitivity of 0.6 instead of 0.8 in one sex is flagged in 80 of 100
data sets with 600 patients, and in 99 of 100 with 1,000.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NotRequired, TypedDict, cast

import numpy as np
import scipy  # loads submodules on first use
from numpy.typing import NDArray
from scipy.special import expit, logit

from cxrdist.bootstrap import LEVEL, Limits, Replicates
from cxrdist.data.labels import NEGATIVE, POSITIVE
from cxrdist.data.patients import MOST_YEARS
from cxrdist.documents import Between, Share, Text
from cxrdist.evaluate.delong import placements
from cxrdist.evaluate.scored import Scored
from cxrdist.info import Count
from cxrdist.intervals import of_auroc, of_share
from cxrdist.model.prediction import call

# Children are separate because their chests differ; then bands of twenty years, as in
# Seyyed-Kalantari et al. (Nature Medicine 27, 2021, 2176) for public chest X-ray data sets.
AGE_BANDS = {0: "0-17", 18: "18-39", 40: "40-59", 60: "60-79", 80: "80+"}
UNKNOWN = "unknown"  # shown, not compared
OTHERS = "others"  # all groups beyond MOST_GROUPS; shown, not compared
MOST_GROUPS = 12  # each further group adds comparisons, which widen the intervals of all
_DIGITS = 6
Difference = Annotated[float, Between(-1, 1)]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class GroupScores(TypedDict):
    """The scores of a class or label in a group; None where a figure is undefined."""

    known: Count
    positives: Count
    auroc: Share | None
    auroc_interval: Limits | None
    recall: Share | None
    recall_interval: Limits | None
    specificity: Share | None
    specificity_interval: Limits | None
    recall_at_point: NotRequired[Share | None]
    """Recall at the operating point chosen on the validation split."""
    recall_at_point_interval: NotRequired[Limits | None]
    specificity_at_point: NotRequired[Share | None]
    specificity_at_point_interval: NotRequired[Limits | None]
    too_few: list[str]
    """Figures with too few patients; they are shown, not compared."""


class Group(TypedDict):
    """The images of a group."""

    images: Count
    patients: Count
    accuracy: NotRequired[Share | None]
    accuracy_interval: NotRequired[Limits | None]
    too_few: list[str]
    """``accuracy`` if it has too few patients."""
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
    """Number of groups of the column that were compared."""


class Groups(TypedDict):
    """The member ``groups`` of metrics.json."""

    fewest: Count
    comparisons: Count
    """Number of differences between two groups, for which the intervals are corrected."""
    columns: dict[str, dict[str, Group]]
    gaps: list[Gap]
    """Flagged gaps first, then by falling difference."""


@dataclass(frozen=True)
class _Figures:
    """One measure of a group, for each of C classes (C = 1 for the accuracy).

    Attributes:
        value: float64 [C], NaN where undefined.
        drawn: values of the replicates, float64 [replicates, C].
        limits: its intervals, [C]; None where undefined.
        images: number of images behind it, int64 [C]; for an AUROC the smaller of positives and
            negatives.
        patients: number of patients, int64 [C], likewise.
    """

    value: Floats
    drawn: Floats
    limits: list[Limits | None]
    images: NDArray[np.int64]
    patients: NDArray[np.int64]


@dataclass(frozen=True)
class _Differences:
    """The differences in one figure of one class between all pairs of groups.

    Attributes:
        label: the class; None for the accuracy.
        groups: names of the groups with enough patients.
        pairs: positions of both groups in `groups`, int64 [2, pairs].
        value: first group minus second, float64 [pairs].
        error: standard errors, float64 [pairs].
        freedom: degrees of freedom of Welch's t-test, float64 [pairs].
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

    A figure is only compared with at least `fewest` patients with the class, and as many without
    it. A class is called at or above its logit in `thresholds`.
    """
    decisions = _decide(scored, thresholds)
    columns: dict[str, dict[str, Group]] = {}
    differences: list[_Differences] = []
    for column, texts in scored.groups.items():
        members = split_groups(column, texts)
        if len(members) < 2:
            continue
        by_group = {
            name: _measure(scored, decisions, replicates, mask) for name, mask in members.items()
        }
        columns[column] = {
            name: _describe(scored, members[name], figures, fewest)
            for name, figures in by_group.items()
        }
        differences += _subtract(column, scored.classes, by_group, fewest)
    comparisons = sum(len(of_class.value) for of_class in differences)
    return {
        "fewest": fewest,
        "comparisons": comparisons,
        "columns": columns,
        "gaps": sorted(
            (_largest(of_class, comparisons) for of_class in differences),
            key=lambda gap: (not gap["flagged"], -gap["difference"]),
        ),
    }


def split_groups(column: str, texts: Sequence[str]) -> dict[str, Bools]:
    """Split the images into the groups of a column.

    Returns:
        A mask, bool [N], by group name: age bands in their order, other groups by falling size;
        `OTHERS` and `UNKNOWN` last.
    """
    names = [age_band(text) for text in texts] if column == "age" else texts
    values, indices = np.unique([name or UNKNOWN for name in names], return_inverse=True)
    counts = np.bincount(indices)
    known = [index for index in np.argsort(-counts, kind="stable") if values[index] != UNKNOWN]
    shown, others = known[:MOST_GROUPS], known[MOST_GROUPS:]
    if column == "age":
        order = list(AGE_BANDS.values())
        shown.sort(key=lambda index: order.index(str(values[index])))
    members = {str(values[index]): indices == index for index in shown}
    if others:
        members[OTHERS] = np.isin(indices, others)
    if UNKNOWN in values:
        members[UNKNOWN] = values[indices] == UNKNOWN
    return members


def age_band(text: str) -> str:
    """Return the band of an age in years; empty if the text is not a valid age."""
    try:
        years = float(text)
    except ValueError:
        return ""
    if not 0 <= years <= MOST_YEARS:
        return ""
    return AGE_BANDS[max(least for least in AGE_BANDS if least <= years)]


def _decide(scored: Scored, thresholds: Mapping[str, float] | None) -> dict[str, Bools]:
    """Return which classes are called, bool [N, C], by suffix: as predicted, at the points."""
    decisions = {"": scored.predicted}
    # A figure is an array over all classes, so all of them need a threshold.
    if thresholds is not None and {*scored.classes} <= thresholds.keys():
        points = np.array([thresholds[name] for name in scored.classes])
        decisions["_at_point"] = call(scored.logits, points)
    return decisions


def _measure(
    scored: Scored, decisions: Mapping[str, Bools], replicates: Replicates, mask: Bools
) -> dict[str, _Figures]:
    """Compute all figures of the images in a mask, bool [N], by measure."""
    columns, patient = np.unique(replicates.patient[mask], return_inverse=True)
    # Without the other patients all products are smaller. Rows of the transpose are selected, since
    # `draws` must stay contiguous by patient.
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


def _count_patients(side: Bools, own: Replicates) -> NDArray[np.int64]:
    """Count the patients with at least one image in a mask, bool [n, C]: int64 [C]."""
    return np.array([own.patients(column) for column in side.T], np.int64)


def _share(part: Bools, whole: Bools, own: Replicates) -> _Figures:
    """Return the share of the images in `whole` that are in `part`, bool [n, C] each."""
    images = whole.sum(axis=0)
    with np.errstate(invalid="ignore"):
        value = part.sum(axis=0) / images
    drawn = own.shares(part, whole)
    columns = zip(part.T, whole.T, drawn, strict=True)
    limits = [of_share(own, *column) for column in columns]
    return _Figures(value, drawn.T, limits, images, _count_patients(whole, own))


def _rank(logits: Floats, positive: Bools, negative: Bools, own: Replicates) -> _Figures:
    """Return the AUROC of each class; all arguments are [n, C].

    The AUROC of a replicate is approximated: that of all images, shifted by the sum of the
    contributions of its images (their placements; DeLong et al. 1988, for patients with several
    images Obuchowski 1997). The shift is made in log odds, which keeps the result within 0 and 1
    (Pepe 2003, section 5.2.3). This needs one matrix product instead of thousands of sorts.
    """
    columns = zip(logits.T, positive.T, negative.T, strict=True)
    of_classes = [_contributions(*column) for column in columns]
    value = np.array([auroc for auroc, _ in of_classes])
    moves = own.sums(np.stack([moves for _, moves in of_classes], axis=1))
    edge = (value == 0) | (value == 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = expit(logit(value) + moves / (value * (1 - value)))
    drawn[:, edge] = value[edge]
    limits: list[Limits | None] = []
    for auroc, values, has, known in zip(
        value.tolist(), drawn.T, positive.T, (positive | negative).T, strict=True
    ):
        is_defined = np.isfinite(auroc)
        limits.append(of_auroc(own.take(known), auroc, values, has[known]) if is_defined else None)
    images = np.minimum(positive.sum(axis=0), negative.sum(axis=0))
    patients = [_count_patients(side, own) for side in (positive, negative)]
    return _Figures(value, drawn, limits, images, np.minimum(*patients))


def _contributions(scores: Floats, positive: Bools, negative: Bools) -> tuple[float, Floats]:
    """Return the AUROC of scores [n], and the contribution of each image to it, float64 [n]."""
    moves = np.zeros(len(scores))
    if not positive.any() or not negative.any():
        return float("nan"), moves
    known = positive | negative
    (above,), (below,) = placements(scores[None, known], positive[known])
    auroc = float(above.mean())
    moves[positive] = (above - auroc) / len(above)
    moves[negative] = (below - auroc) / len(below)
    return auroc, moves


def _describe(scored: Scored, mask: Bools, figures: Mapping[str, _Figures], fewest: int) -> Group:
    """Write the figures of a group for metrics.json."""
    targets = scored.targets[mask]
    positives = (targets == POSITIVE).sum(axis=0)
    known = (targets >= 0).sum(axis=0)
    of_classes = {name: of_class for name, of_class in figures.items() if name != "accuracy"}
    group: dict[str, object] = {
        "images": int(mask.sum()),
        "patients": len({scored.patients[i] for i in np.flatnonzero(mask)}),
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
    """Write the figures of one class with intervals, and list those with too few patients."""
    row: dict[str, object] = {}
    too_few = []
    for measure, of_measure in figures.items():
        limits = of_measure.limits[column]
        row[measure] = round(float(of_measure.value[column]), _DIGITS) if limits else None
        row[f"{measure}_interval"] = limits
        if limits and of_measure.patients[column] < fewest:
            too_few.append(measure)
    return {**row, "too_few": too_few}


def _subtract(
    column: str, classes: Sequence[str], by_group: Mapping[str, Mapping[str, _Figures]], fewest: int
) -> Iterator[_Differences]:
    """Compare all pairs of groups of a column that have enough patients, figure by figure."""
    names = [name for name in by_group if name not in (OTHERS, UNKNOWN)]
    for measure in next(iter(by_group.values())):
        labels = [None] if measure == "accuracy" else classes
        for i, label in enumerate(labels):
            groups = [name for name in names if by_group[name][measure].patients[i] >= fewest]
            if len(groups) < 2:
                continue
            figures = [by_group[name][measure] for name in groups]
            yield _Differences(column, label, measure, groups, *_pairwise(figures, i, measure))


def _pairwise(
    figures: Sequence[_Figures], column: int, measure: str
) -> tuple[NDArray[np.int64], Floats, Floats, Floats]:
    """Return pairs, values, errors and freedom, as in `_Differences`."""
    pairs = np.stack(np.triu_indices(len(figures), 1))
    value = np.array([of_group.value[column] for of_group in figures])[pairs]
    drawn = np.stack([of_group.drawn[:, column] for of_group in figures], axis=1)
    images = np.array([of_group.images[column] for of_group in figures])[pairs]
    patients = np.array([of_group.patients[column] for of_group in figures])[pairs]
    # NaN: the rare replicates without any patient of a group and class are ignored.
    alone = np.nanvar(drawn, axis=0)[pairs]
    # The variance of the difference, because groups may share patients (e.g. with two views).
    both = np.nanvar(drawn[:, pairs[0]] - drawn[:, pairs[1]], axis=0)
    # Half an image is added to each side: two groups without errors must not have zero variance.
    pooled = ((value * images).sum(axis=0) + 0.5) / (images.sum(axis=0) + 1)
    # If all images are right (or all wrong), the correlation within patients cannot be estimated,
    # so each patient counts as one independent image.
    count = np.where((value == 0) | (value == 1), patients, images)
    variance = np.maximum(alone, _spread(measure, pooled) / count)
    error = np.sqrt(both + (variance - alone).sum(axis=0))
    freedom = variance.sum(axis=0) ** 2 / (variance**2 / (patients - 1)).sum(axis=0)
    return pairs, value[0] - value[1], error, freedom


def _spread(measure: str, value: Floats) -> Floats:
    """Return the variance that one image adds to a figure, at the pooled value of both groups.

    It is a lower limit for the variance of a group, because a few images that are all right have no
    spread of their own but prove little. For shares a score test does the same (Newcombe 1998,
    Statistics in Medicine 17, 857); for an AUROC it is the variance of placements of exponential
    scores (Hanley & McNeil 1982).
    """
    if measure == "auroc":
        return np.minimum(value / (2 - value), 2 * value**2 / (1 + value)) - value**2
    return value * (1 - value)


def _largest(differences: _Differences, comparisons: int) -> Gap:
    """Return the largest flagged difference, or the largest if none is flagged."""
    sizes = np.abs(differences.value)
    quantile = 1 - (1 - LEVEL) / 2 / comparisons
    reach = differences.error * scipy.stats.t.ppf(quantile, differences.freedom)
    flagged = sizes > reach
    # No difference exceeds 1: with 1 added, each flagged one is above all others.
    largest = int(np.argmax(np.where(flagged, sizes + 1, sizes)))
    first, second = differences.pairs[:, largest]
    if differences.value[largest] < 0:
        first, second = second, first
    ends = sizes[largest] + reach[largest] * np.array([-1, 1])
    return {
        "column": differences.column,
        "label": differences.label,
        "measure": differences.measure,
        "higher": differences.groups[first],
        "lower": differences.groups[second],
        "difference": round(float(sizes[largest]), _DIGITS),
        "interval": [round(float(end), _DIGITS) for end in np.clip(ends, -1, 1)],
        "flagged": bool(flagged[largest]),
        "groups": len(differences.groups),
    }
