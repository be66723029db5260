"""Measure how much of the relevance lies in the border, in the corners, and outside the lungs.

It needs no annotations, except masks for the last. Only the map of the likeliest explained class of
each image is measured: maps of other classes are nearly the same except for sign and scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxrdist.bootstrap import Replicates, draw, rarest_class
from cxrdist.data.regions import border, corners
from cxrdist.explain.description import ClassRow, OutsideInfo, OutsideRow, RegionInfo
from cxrdist.explain.heatmap import overlay, smooth
from cxrdist.intervals import describe, of_values

NEAR = 0.1
"""Distance up to which the peak of an image counts as that of the mean map, as a fraction of the
side."""

_ONE = 1 << 40
"""A relevance of 1 in the sums of mean maps. Sums of integers do not depend on the order, so any
number of ranks gives the same mean; 8 million images fit."""


class Look(NamedTuple):
    """Where the relevance of an image lies."""

    number: int
    """Of the sample."""
    target: int
    """Index of the class among the explained classes."""
    peak: tuple[int, int]
    """Row and column of the largest absolute relevance, smoothed."""
    regions: dict[str, tuple[float, float, bool]]
    """Share of the absolute relevance, share of the area, and whether the peak lies there."""


@dataclass
class Sums:
    """Sums over the images of each class, for the mean maps.

    Attributes:
        maps: int64 [S, S] by index of the class, sums of R / sum |R| in units of 1 / _ONE.
        xrays: int64 [S, S] by index of the class, sums of the images.
    """

    maps: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    xrays: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    def add(self, target: int, relevance: NDArray[np.float32], image: NDArray[np.uint8]) -> None:
        """Add an image and its map, [S, S] both, whose relevance is not zero everywhere."""
        exact = relevance.astype(np.float64)
        whole = np.rint(exact / np.abs(exact).sum() * _ONE).astype(np.int64)
        self.merge(Sums({target: whole}, {target: image.astype(np.int64)}))

    def merge(self, other: "Sums") -> None:
        """Add the sums of other images."""
        for own, others in ((self.maps, other.maps), (self.xrays, other.xrays)):
            for target, values in others.items():
                # Not in place: the array may belong to `other`.
                own[target] = own[target] + values if target in own else values

    def mean_map(self, target: int, num_images: int) -> NDArray[np.float64]:
        """Return the mean of R / sum |R| over the images of a class, [S, S]."""
        return self.maps[target] / (_ONE * num_images)

    def picture(self, target: int, num_images: int) -> Image.Image:
        """Return the mean map of a class over its mean X-ray."""
        xray = np.rint(self.xrays[target] / num_images).astype(np.uint8)
        return overlay(xray, self.mean_map(target, num_images))


def look(
    number: int, target: int, relevance: NDArray[np.float32], lungs: NDArray[np.bool_] | None
) -> Look | None:
    """Measure where the relevance [S, S] of a sample for a class lies.

    Returns:
        None if the relevance is zero everywhere.

    Raises:
        CxrdistError: relevance is not finite.
    """
    smoothed = np.abs(smooth(relevance))
    if not relevance.any():
        return None
    row, column = divmod(int(smoothed.argmax()), smoothed.shape[1])
    masks = {"border": border(len(relevance)), "corners": corners(len(relevance))}
    if lungs is not None:
        masks["beside_lungs"] = ~lungs
    regions = {
        name: (*share_within(relevance, mask), bool(mask[row, column]))
        for name, mask in masks.items()
    }
    return Look(number, target, (row, column), regions)


def share_within(relevance: NDArray[np.floating], mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the share of |relevance| [H, W] in a mask [H, W], and the share of the area in it.

    A map of zeros has the share 0.
    """
    amount = np.abs(relevance).astype(np.float64)
    share = amount[mask].sum() / (amount.sum() or 1.0)
    return min(1.0, float(share)), float(mask.mean())  # rounding may give slightly more than 1


def summarise(
    looks: Sequence[Look], sums: Sums, names: Sequence[str], patients: Mapping[int, str]
) -> OutsideInfo:
    """Average over images in the order of their numbers, with intervals by patient."""
    patient_of = [patients[one.number] for one in looks]
    target = np.array([one.target for one in looks], np.int64)
    has = target[:, None] == np.arange(len(names))
    replicates = draw(patient_of, rarest_class(has, patient_of))
    classes = {}
    for index, name in enumerate(names):
        own = has[:, index]
        if own.any():
            mean = np.abs(smooth(sums.mean_map(index, int(own.sum()))))
            classes[name] = _class_row(looks, replicates, own, mean)
    everything = np.ones(len(looks), bool)
    return {
        "all": _row(looks, replicates, everything),
        "classes": classes,
        "intervals": describe(replicates),
    }


def _row(looks: Sequence[Look], replicates: Replicates, own: NDArray[np.bool_]) -> OutsideRow:
    """Return the regions of some images, which the mask `own` [N] selects."""
    names = dict.fromkeys(
        name for one, is_own in zip(looks, own, strict=True) if is_own for name in one.regions
    )
    return {
        "images": int(own.sum()),
        "patients": replicates.patients(own),
        "regions": {name: _region(name, looks, replicates, own) for name in names},
    }


def _region(
    name: str, looks: Sequence[Look], replicates: Replicates, own: NDArray[np.bool_]
) -> RegionInfo:
    """Return the mean share of a region over the selected images that have this region."""
    known = own & np.array([name in one.regions for one in looks])
    rows = [one.regions.get(name, (0.0, 0.0, False)) for one in looks]
    share, area = (np.array([row[i] for row in rows], np.float64) for i in (0, 1))
    peaks = np.array([row[2] for row in rows], np.float64)
    return {
        "images": int(known.sum()),
        "patients": replicates.patients(known),
        "area": float(area[known].mean()),
        "share": float(share[known].mean()),
        "share_interval": of_values(replicates, share, known),
        "peaks": float(peaks[known].mean()),
        "peaks_interval": of_values(replicates, peaks, known),
    }


def _class_row(
    looks: Sequence[Look], replicates: Replicates, own: NDArray[np.bool_], mean: NDArray[np.float64]
) -> ClassRow:
    """Return the regions of a class, and the share of images whose peak is that of the mean map.

    `own` is a mask of the images of the class; `mean` is their absolute, smoothed mean map [S, S].
    """
    size_px = len(mean)
    row, column = divmod(int(mean.argmax()), size_px)
    positions = np.arange(size_px)
    near = np.hypot(positions[:, None] - row, positions - column) <= NEAR * size_px
    alike = np.array([near[one.peak] for one in looks], np.float64)
    return {
        **_row(looks, replicates, own),
        "alike": float(alike[own].mean()),
        "alike_interval": of_values(replicates, alike, own),
        "alike_area": float(near.mean()),
    }
