"""The bootstrap over patients (Efron & Tibshirani 1993; Field & Welsh 2007).

Images of one patient are similar, so patients are drawn instead of images: each replicate draws as
many patients as there are, with replacement, and takes all images of each. Patients are drawn
within strata, so that no replicate lacks a class.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from cxrdist.documents import Between

REPLICATES = 2000  # their standard error is then right to about 1 / sqrt(2 * 2000) = 1.6 %
LEVEL = 0.95
SEED = 0  # fixed, so that the same predictions always have the same intervals
ALIKE = 1e-9  # spread below which replicates are equal except for rounding
_BLOCK = 100  # replicates at once: 30,000 patients in float32 are 12 MB, which a cache holds

Values = NDArray[np.float64]  # [replicates], NaN where a replicate lacks images for the figure
Limits = Annotated[list[float], Between(2, 2)]
"""Lower and upper limit of a 95 % interval."""


@dataclass(frozen=True)
class Replicates:
    """The number of times that each patient was drawn in each replicate.

    The same patients, strata, number and seed give the same draws, so that figures of two models
    on the same images can be compared replicate by replicate.

    Attributes:
        draws: uint8 [replicates, patients], in Fortran order: contiguous by patient.
        patient: int64 [N], the column of each image's patient.
    """

    draws: NDArray[np.uint8]
    patient: NDArray[np.int64]

    def take(self, selected: NDArray[np.int64] | NDArray[np.bool_]) -> "Replicates":
        """Return the same draws for some of the images, by indices or by a mask [N]."""
        return replace(self, patient=self.patient[selected])

    def patients(self, images: NDArray[np.bool_]) -> int:
        """Count the patients of some images, a mask [N]."""
        return int(np.count_nonzero(np.bincount(self.patient[images])))

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum values of the images in each replicate: float64 [N, K] -> [replicates, K]."""
        # float64, since values need not be the whole numbers that float32 sums exactly.
        of_patient = self._by_patient(np.arange(len(values)), len(values), np.float64).T @ values
        return np.concatenate([drawn.T @ of_patient for drawn in self._blocks(np.float64)])

    def share(self, part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> Values:
        """Return the share of images in `part` among those in `whole`, [N], in each replicate."""
        return self.shares(part[:, None], whole[:, None])[0]

    def shares(self, parts: NDArray[np.bool_], wholes: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return several shares, much faster than one by one: bool [N, K] -> [K, replicates]."""
        sums = self.sums(np.hstack([parts & wholes, wholes]).astype(np.float64)).T
        inside, all_of_them = np.split(sums, 2)
        with np.errstate(invalid="ignore"):
            return inside / all_of_them

    def auroc(self, scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> Values:
        """Return the AUROC of scores [N] for a truth [N] in each replicate; ties count for half."""
        return self.ranking(scores, truth)[0]

    def ranking(
        self, scores: NDArray[np.float64], truth: NDArray[np.bool_]
    ) -> tuple[Values, Values]:
        """Return AUROC and average precision of scores [N] for a truth [N] in each replicate.

        Both follow from the numbers of negatives below, at and above the score of each positive. So
        images are sorted only once, and each replicate sums the draws in these intervals.
        """
        levels, level = np.unique(scores[truth], return_inverse=True)
        # Bin 2k + 1 is the k-th level itself, bin 2k everything between it and the level before.
        under, upto = (np.searchsorted(levels, scores[~truth], side) for side in ("left", "right"))
        positives = self._by_patient(level, len(levels), np.float32, truth)
        negatives = self._by_patient(under + upto, 2 * len(levels) + 1, np.float32, ~truth)
        scored = []
        for drawn in self._blocks(np.float32):
            hits = (positives @ drawn).astype(np.float64)
            scored.append(_ranked(hits, np.cumsum(negatives @ drawn, axis=0, dtype=np.float64)))
        auroc, average_precision = np.concatenate(scored, axis=1)
        return auroc, average_precision

    def _blocks(self, kind: Any) -> Iterator[NDArray[Any]]:
        """Yield blocks of replicates [patients, block]; float32 is exact for sums to 16 million."""
        for begin in range(0, len(self.draws), _BLOCK):
            # C-contiguous, as `draws` is in Fortran order: csr_array multiplies it without a copy.
            yield self.draws[begin : begin + _BLOCK].T.astype(kind)

    def _by_patient(
        self, row: NDArray[np.int64], rows: int, kind: Any, images: Any = slice(None)
    ) -> csr_array:
        """Count images by row and patient, [rows, patients], for those in `images`."""
        patient = self.patient[images]
        shape = (rows, self.draws.shape[1])
        # SciPy adds up entries with the same row and patient.
        return csr_array((np.ones(len(patient), kind), (row, patient)), shape=shape)


def _ranked(hits: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return AUROC and average precision of B replicates, [2, B].

    Args:
        hits: positives at each of the levels, in rising order: [levels, B].
        below: negatives up to each bin, see `Replicates.ranking`: [2 * levels + 1, B].
    """
    all_hits, all_misses = hits.sum(axis=0), below[-1]
    under, upto = below[:-1:2], below[1::2]
    wins = (hits * (under + upto)).sum(axis=0) / 2
    hits_from = np.cumsum(hits[::-1], axis=0)[::-1]
    precision = np.zeros_like(hits)
    # A level without a drawn positive contributes nothing, and may have no image at or above it.
    np.divide(hits_from, hits_from + (all_misses - under), out=precision, where=hits > 0)
    with np.errstate(invalid="ignore"):  # 0 / 0
        auroc = wins / (all_hits * all_misses)
        average_precision = (hits * precision).sum(axis=0) / all_hits
    # Without negatives the average precision is 1 for any scores.
    return np.stack([auroc, np.where(all_misses > 0, average_precision, np.nan)])


def draw(
    patients: Sequence[str], strata: Sequence[str], replicates: int = REPLICATES, seed: int = SEED
) -> Replicates:
    """Draw patients with replacement within strata.

    ``patients`` and ``strata`` (such as the class) are given for each of the N images. Patients
    with the same set of strata form one stratum.
    """
    column = {name: i for i, name in enumerate(dict.fromkeys(patients))}
    strata_of: list[set[str]] = [set() for _ in column]
    for name, stratum in zip(patients, strata, strict=True):
        strata_of[column[name]].add(stratum)
    members: dict[tuple[str, ...], list[int]] = {}
    for i, own_strata in enumerate(strata_of):
        members.setdefault(tuple(sorted(own_strata)), []).append(i)
    random = np.random.default_rng(seed)
    # How often a patient is drawn is about Poisson(1): 255 is out of reach.
    draws = np.zeros((len(column), replicates), np.uint8)
    for columns in members.values():
        # Blocks keep the memory small, and the generator's numbers are the same for any _BLOCK.
        for begin in range(0, replicates, _BLOCK):
            draws[columns, begin : begin + _BLOCK] = _draw_block(
                random, len(columns), min(_BLOCK, replicates - begin)
            )
    return Replicates(draws.T, np.array([column[name] for name in patients], np.int64))


def rarest_class(has: NDArray[np.bool_], patients: Sequence[str]) -> list[str]:
    """Return for each image the rank of the rarest class that its patient has; C for none.

    With these strata, of which there are at most C + 1, no replicate lacks the rarest class.
    ``has`` are the classes of the N images, bool [N, C].
    """
    # The first argsort gives the order of the classes, the second the rank of each.
    rank = np.argsort(np.argsort(has.sum(axis=0), kind="stable"))
    ranks = np.where(has, rank, len(rank)).min(axis=1, initial=len(rank))
    rarest: dict[str, int] = {}
    for patient, own in zip(patients, ranks.tolist(), strict=True):
        rarest[patient] = min(own, rarest.get(patient, own))
    return [str(rarest[patient]) for patient in patients]


def _draw_block(random: np.random.Generator, size: int, replicates: int) -> NDArray[np.uint8]:
    """Draw `size` patients out of `size` with replacement; return counts, [size, replicates]."""
    drawn = random.integers(size, size=(replicates, size)) + size * np.arange(replicates)[:, None]
    counted = np.bincount(drawn.ravel(), minlength=replicates * size)
    return counted.reshape(replicates, size).T.astype(np.uint8)


def interval(values: Values) -> list[float] | None:
    """Return the percentile interval of a difference or another unbounded figure.

    For figures from 0 to 1 see `cxrdist.intervals`. None if no replicate has the figure, or if all
    have the same one: such replicates do not show how certain it is.
    """
    finite = values[np.isfinite(values)]
    if not len(finite) or np.ptp(finite) < ALIKE:
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return [round(float(low), 6), round(float(high), 6)]
