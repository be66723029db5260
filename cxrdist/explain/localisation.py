"""Localisation: score whether maps point at regions outlined by people.

Three scores compare a map [H, W] with an outline:

- pointing game (Zhang et al. 2018, IJCV 126): whether the largest value lies inside;
- share of the positive values inside; its mean over the images divided by the mean share of the
  area is the ratio to chance (1);
- overlap (intersection over union) of the outline with the pixels of the largest values.

All maps are smoothed like the pictures of relevance, which removes the grid of the first layers. A
map without positive values has 0 in all three. If several values are the largest, the share of them
inside counts, so that a constant map scores like chance.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from cxrdist.bootstrap import Limits, Replicates, draw, rarest_class
from cxrdist.documents import Between, Sha256, Share, Text
from cxrdist.explain.heatmap import smooth
from cxrdist.explain.outside import share_within
from cxrdist.info import Count
from cxrdist.intervals import Intervals, bounded, describe, positive, unbounded

TOPS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
"""Candidates for the share of pixels that a map marks."""
FIXED_TOP = 0.2
"""The share that is used if none was chosen on val."""
FEWEST_CASES = 10
"""Fewest cases of val to choose a share for each map."""
ALL = "all"
MOST_PICTURES = 100

Method = Literal["lrp", "contrast", "grad_cam", "gradient", "mean_outline", "centre", "chance"]
Scores = NDArray[np.float64]
"""Scores of a map: pointing, share inside, 1 without positive values, and the overlaps of TOPS."""
POINTING, INSIDE, BLANK, OVERLAPS = 0, 1, 2, slice(3, None)


class MethodScores(TypedDict):
    """The scores of one method, means over the cases of a group."""

    method: Method
    pointing: Share
    pointing_interval: Limits
    inside: Share
    inside_interval: Limits
    times_chance: Annotated[float, Between(0, 1e9)]
    times_chance_interval: Limits | None
    overlap: Share
    overlap_interval: Limits
    marked: Share
    """Share of the pixels that the map marks for the overlap, those of the largest values."""
    blank: Count
    """Maps without positive values."""
    pointing_gain_interval: Limits | None
    """Interval of the difference to the centre prior on the same images."""
    times_chance_gain_interval: Limits | None


class Group(TypedDict):
    """The cases of a class, or all of them."""

    name: Text
    images: Count
    patients: Count
    cases: Count
    """Pairs of image and class."""
    shapes: Count
    """Boxes or masks of the cases."""
    area: Share
    """Mean share of the square inside the outline."""
    methods: list[MethodScores]


class Pictured(TypedDict):
    """An image with pictures: the files, and the figures shown beside them."""

    key: Text
    target: Text
    """The class that is explained."""
    other: Text | None
    """The likeliest other class, which the contrast is against."""
    rank: Literal["best", "worst"]
    inside: Share
    area: Share
    points: bool
    xray: Text
    lrp: Text
    contrast: Text | None


class Localisation(TypedDict):
    """The content of localisation.json."""

    format: Literal["cxrdist-localisation-1"]
    split: Text
    index_sha256: Sha256
    kind: Literal["boxes", "masks"]
    origin: Text
    left_out: dict[str, Count]
    """Boxes or masks that are not used, by reason."""
    val_cases: Count
    """Cases of val on which the marked share of each method was chosen; 0 if it is fixed."""
    train_cases: Count
    """Cases of train in the mean outline; 0 if there is none."""
    groups: list[Group]
    intervals: Intervals
    pictures: Annotated[list[Pictured], Between(0, MOST_PICTURES)]


class Scored(NamedTuple):
    """The scores of the maps of one image and class."""

    number: int
    target: str
    shapes: int
    area: float
    scores: Mapping[Method, Scores]
    other: str | None = None
    """The likeliest other class, which the contrast is against."""


def score_map(values: NDArray[np.floating], outline: NDArray[np.bool_]) -> Scores:
    """Compare a map [H, W] with an outline, bool [H, W] with at least one pixel."""
    flat, within = smooth(values).ravel(), outline.ravel()
    amounts = np.clip(flat, 0, None)
    if not amounts.any():
        return np.array([0.0, 0.0, 1.0, *[0.0] * len(TOPS)])
    largest = flat == flat.max()
    order = np.argsort(-flat, kind="stable")[: np.count_nonzero(amounts)]
    hits = np.cumsum(within[order])
    marked = np.minimum([round(top * len(flat)) or 1 for top in TOPS], len(order))
    common = hits[marked - 1]
    overlaps = common / (marked + within.sum() - common)
    pointing = np.count_nonzero(largest & within) / np.count_nonzero(largest)
    inside, _ = share_within(amounts, within)
    return np.array([pointing, inside, 0.0, *overlaps])


def score_chance(area: float) -> Scores:
    """Return the scores of a constant map, which marks all pixels."""
    return np.array([area, area, 0.0, *[area] * len(TOPS)])


def choose_tops(cases: Sequence[Scored]) -> dict[Method, int]:
    """Choose for each method the share in `TOPS` with the largest mean overlap, by index."""
    return {
        method: int(np.mean([case.scores[method][OVERLAPS] for case in cases], axis=0).argmax())
        for method in (cases[0].scores if cases else ())
    }


def summarise(
    cases: Sequence[Scored], patients: Sequence[str], tops: Mapping[Method, int]
) -> tuple[list[Group], Intervals]:
    """Average the scores of all cases (at least one), then of each class, with intervals.

    The patient of each case is given, and for each method the share of pixels that it marks, by its
    index in `TOPS`; without, it is `FIXED_TOP`.
    """
    names = sorted({case.target for case in cases})
    has = np.array([[case.target == name for name in names] for case in cases])
    replicates = draw(patients, rarest_class(has, patients))
    chosen = {method: tops.get(method, TOPS.index(FIXED_TOP)) for method in cases[0].scores}
    groups = [(ALL, np.ones(len(cases), bool)), *zip(names, has.T, strict=True)]
    rows = [_group(name, cases, own, replicates.take(own), chosen) for name, own in groups]
    return rows, describe(replicates)


def _group(
    name: str,
    cases: Sequence[Scored],
    own: NDArray[np.bool_],
    replicates: Replicates,
    tops: Mapping[Method, int],
) -> Group:
    members = [case for case, is_own in zip(cases, own, strict=True) if is_own]
    areas = np.array([case.area for case in members])
    everyone = np.ones(len(members), bool)
    patients = replicates.patients(everyone)
    columns: dict[Method, NDArray[np.float64]] = {}
    for method, top in tops.items():
        scores = np.array([case.scores[method] for case in members])
        overlap = scores[:, OVERLAPS][:, top]
        columns[method] = np.column_stack([scores[:, : OVERLAPS.start], overlap])
    sums = {
        method: replicates.sums(np.column_stack([values, areas, everyone]))
        for method, values in columns.items()
    }
    return {
        "name": name,
        "images": len({case.number for case in members}),
        "patients": patients,
        "cases": len(members),
        "shapes": sum(case.shapes for case in members),
        "area": float(areas.mean()),
        "methods": [
            _method_scores(method, columns, sums, float(areas.mean()), patients, TOPS[top])
            for method, top in tops.items()
        ],
    }


def _method_scores(
    method: Method,
    columns: Mapping[Method, NDArray[np.float64]],
    sums: Mapping[Method, NDArray[np.float64]],
    area: float,
    patients: int,
    marked: float,
) -> MethodScores:
    """Return the mean scores of a method with their intervals."""
    values = columns[method]
    pointing, inside, _, overlap = (float(value) for value in values.mean(0))
    (points, insides, _, overlaps), times = _replicated(sums[method])
    gains: list[Limits | None] = [None, None]
    if method not in ("centre", "chance"):
        (centre, *_), centre_times = _replicated(sums["centre"])
        by_points, by_inside, *_ = values.mean(0) - columns["centre"].mean(0)
        gains = [
            unbounded(by_points, points - centre, patients),
            unbounded(by_inside / area, times - centre_times, patients),
        ]
    return {
        "method": method,
        "pointing": pointing,
        "pointing_interval": bounded(pointing, points, patients),
        "inside": inside,
        "inside_interval": bounded(inside, insides, patients),
        "times_chance": inside / area,
        "times_chance_interval": positive(inside / area, times, patients),
        "overlap": overlap,
        "overlap_interval": bounded(overlap, overlaps, patients),
        "marked": 1.0 if method == "chance" else marked,
        "blank": int(values[:, BLANK].sum()),
        "pointing_gain_interval": gains[0],
        "times_chance_gain_interval": gains[1],
    }


def _replicated(sums: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean scores [4, replicates] and the ratio to chance [replicates] of the replicates.

    Both are NaN for replicates without cases.
    """
    # Columns as in `_group`: four scores, the area, and 1 per case.
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums[:, :4] / sums[:, 5:]
        return means.T, sums[:, INSIDE] / sums[:, 4]
