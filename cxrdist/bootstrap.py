"""The bootstrap over patients (Efron & Tibshirani 1993; Field & Welsh 2007).

Images of one patient are alike, so patients are drawn and not images: each replicate takes as many
patients as there are, with replacement, and all images of each. Patients are drawn within strata,
so that no replicate lacks a class.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from cxrdist.documents import Between

REPLICATES = 2000
LEVEL = 0.95
SEED = 0
_BLOCK = 100  # replicates at once: 30,000 patients in float32 are 12 MB, which a cache holds

Values = NDArray[np.float64]  # [replicates], NaN where a replicate lacks what the figure needs
Limits = Annotated[list[float], Between(2, 2)]
"""Lower and upper limit of a 95 % interval."""


@dataclass(frozen=True)
class Replicates:
    """How often each patient was drawn in each replicate.

    The same patients, strata, number and seed give the same draws, so that figures of two models
    on the same images can be compared replicate by replicate.

    Attributes:
        draws: uint8 [replicates, patients], in memory patient by patient (Fortran's order).
        patient: int64 [N], the column of each image's patient.
    """

    draws: NDArray[np.uint8]
    patient: NDArray[np.int64]

    def take(self, places: NDArray[np.int64] | NDArray[np.bool_]) -> "Replicates":
        """Return the same draws for some of the images, by place or by a mask [N]."""
        return replace(self, patient=self.patient[places])

    def patients(self, images: NDArray[np.bool_]) -> int:
        """Count the patients of some images, a mask [N]."""
        return int(np.count_nonzero(np.bincount(self.patient[images])))

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum values of the images in each replicate: float64 [N, K] -> [replicates, K]."""
        of_patient = self._by_patient(np.arange(len(values)), len(values), np.float64).T @ values
        return np.concatenate([drawn.T @ of_patient for drawn in self._blocks(np.float64)])

    def share(self, part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> Values:
        """The share of images [N] that are in `part` among those in `whole`, in each replicate."""
        return self.shares(part[:, None], whole[:, None])[0]

    def shares(self, parts: NDArray[np.bool_], wholes: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Several shares at once, much faster than one by one: bool [N, K] -> [K, replicates]."""
        sums = self.sums(np.hstack([parts & wholes, wholes]).astype(np.float64)).T
        inside, all_of_them = np.split(sums, 2)
        with np.errstate(invalid="ignore"):
            return inside / all_of_them

    def auroc(self, scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> Values:
        """Return the AUROC of scores [N] for a truth [N] in each replicate; ties count for half."""
        return self.ranking(scores, truth)[0]

    def average_precision(self, scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> Values:
        """Return the average precision of scores [N] for a truth [N] in each replicate."""
        return self.ranking(scores, truth)[1]

    def ranking(
        self, scores: NDArray[np.float64], truth: NDArray[np.bool_]
    ) -> tuple[Values, Values]:
        """The AUROC and the average precision of scores [N] for a truth [N] in each replicate.

        Both follow from how many negatives are below, at and above the score of each positive, so
        that images are sorted once, and each replicate only adds up the draws in these intervals.
        """
        levels, level = np.unique(scores[truth], return_inverse=True)
        # Place 2k + 1 is the k-th level itself, place 2k all between it and the level before it.
        under, upto = (np.searchsorted(levels, scores[~truth], side) for side in ("left", "right"))
        positives = self._by_patient(level, len(levels), np.float32, truth)
        negatives = self._by_patient(under + upto, 2 * len(levels) + 1, np.float32, ~truth)
        found = []
        for drawn in self._blocks(np.float32):
            hits = (positives @ drawn).astype(np.float64)
            found.append(_ranked(hits, np.cumsum(negatives @ drawn, axis=0, dtype=np.float64)))
        auroc, average_precision = np.concatenate(found, axis=1)
        return auroc, average_precision

    def _blocks(self, kind: Any) -> Iterator[NDArray[Any]]:
        """Some replicates at a time, [patients, block]; float32 holds sums up to 16 million."""
        for begin in range(0, len(self.draws), _BLOCK):
            yield self.draws[begin : begin + _BLOCK].T.astype(kind)

    def _by_patient(
        self, row: NDArray[np.int64], rows: int, kind: Any, images: Any = slice(None)
    ) -> csr_array:
        """Count the images of each row (of those in `images`) by patient, [rows, patients]."""
        patient = self.patient[images]
        shape = (rows, self.draws.shape[1])
        return csr_array((np.ones(len(patient), kind), (row, patient)), shape=shape)


def _ranked(hits: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    """AUROC and average precision, [2, B], of B replicates.

    Args:
        hits: positives at each of the levels, in rising order: [levels, B].
        below: negatives up to each place, see `Replicates.ranking`: [2 * levels + 1, B].
    """
    all_hits, all_misses = hits.sum(axis=0), below[-1]
    under, upto = below[:-1:2], below[1::2]
    wins = (hits * (under + upto)).sum(axis=0) / 2
    hits_from = np.cumsum(hits[::-1], axis=0)[::-1]
    precision = np.zeros_like(hits)
    np.divide(hits_from, hits_from + (all_misses - under), out=precision, where=hits > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = wins / (all_hits * all_misses)
        average_precision = (hits * precision).sum(axis=0) / all_hits
    return np.stack([auroc, np.where(all_misses > 0, average_precision, np.nan)])


def draw(
    patients: Sequence[str], strata: Sequence[str], replicates: int = REPLICATES, seed: int = SEED
) -> Replicates:
    """Draw patients with replacement within strata.

    Args:
        patients: whose the N images are.
        strata: of the N images, such as their classes; a patient is in the stratum of all of its
            images' strata together.
        replicates: how often.
        seed: of the draws.
    """
    place = {name: i for i, name in enumerate(dict.fromkeys(patients))}
    of_patient: list[set[str]] = [set() for _ in place]
    for name, stratum in zip(patients, strata, strict=True):
        of_patient[place[name]].add(stratum)
    members: dict[tuple[str, ...], list[int]] = {}
    for i, of_one in enumerate(of_patient):
        members.setdefault(tuple(sorted(of_one)), []).append(i)
    random = np.random.default_rng(seed)
    draws = np.zeros((len(place), replicates), np.uint8)
    for columns in members.values():
        for begin in range(0, replicates, _BLOCK):
            draws[columns, begin : begin + _BLOCK] = _draw_block(
                random, len(columns), min(_BLOCK, replicates - begin)
            )
    return Replicates(draws.T, np.array([place[name] for name in patients], np.int64))


def rarest_class(has: NDArray[np.bool_], patients: Sequence[str]) -> list[str]:
    """Give each image the rarest class that its patient has, as its rank, the last one for none.

    So there are at most as many strata as classes and one, and no replicate lacks the rarest class.

    Args:
        has: which class the N images have, bool [N, C].
        patients: whose they are.
    """
    rank = np.argsort(np.argsort(has.sum(axis=0), kind="stable"))
    ranks = np.where(has, rank, len(rank)).min(axis=1, initial=len(rank))
    rarest: dict[str, int] = {}
    for patient, own in zip(patients, ranks.tolist(), strict=True):
        rarest[patient] = min(own, rarest.get(patient, own))
    return [str(rarest[patient]) for patient in patients]


def _draw_block(random: np.random.Generator, size: int, replicates: int) -> NDArray[np.uint8]:
    """Draw `size` patients of as many, with replacement: how often each, [size, replicates]."""
    drawn = random.integers(size, size=(replicates, size)) + size * np.arange(replicates)[:, None]
    counted = np.bincount(drawn.ravel(), minlength=replicates * size)
    return counted.reshape(replicates, size).T.astype(np.uint8)


def interval(values: Values) -> list[float] | None:
    """Return the percentile interval of a difference or another unbounded figure.

    Figures from 0 to 1 have better ones in `cxrdist.intervals`. None where no replicate
    has the figure.
    """
    found = values[np.isfinite(values)]
    if not len(found):
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return [round(float(low), 6), round(float(high), 6)]
