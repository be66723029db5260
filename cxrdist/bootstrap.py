"""Intervals: the bootstrap over patients (Efron & Tibshirani 1993; Field & Welsh 2007).

Images of one patient are alike, so patients are drawn and not images: each replicate takes as many
patients as there are, with replacement, and all images of each. Patients are drawn within strata,
so that no replicate lacks a class.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REPLICATES = 2000
LEVEL = 0.95
SEED = 0
_BLOCK = 100  # replicates at once

Values = NDArray[np.float64]  # [replicates], NaN where a replicate lacks what the figure needs


@dataclass(frozen=True)
class Replicates:
    """How often each patient was drawn in each replicate.

    The same patients, strata, number and seed give the same draws, so that figures of two models
    on the same images can be compared replicate by replicate.

    Attributes:
        draws: uint8 [replicates, patients].
        patient: int64 [N], the column of each image's patient.
    """

    draws: NDArray[np.uint8]
    patient: NDArray[np.int64]

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum values of the images in each replicate: float64 [N, K] -> [replicates, K]."""
        of_patient = np.zeros((self.draws.shape[1], values.shape[1]))
        np.add.at(of_patient, self.patient, values)
        return self.draws @ of_patient

    def share(self, part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> Values:
        """The share of images [N] that are in `part` among those in `whole`, in each replicate."""
        inside, all_of_it = self.sums(np.stack([part & whole, whole], 1).astype(np.float64)).T
        with np.errstate(invalid="ignore"):
            return inside / all_of_it

    def auroc(self, scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> Values:
        """The AUROC of scores [N] for a truth [N] in each replicate; ties count for half."""
        order = np.argsort(scores, kind="stable")
        last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
        found = []
        for weights in self._weights(order):
            above, below = (
                np.diff(np.cumsum(weights * side, axis=1)[:, last], axis=1, prepend=0.0)
                for side in (truth[order], ~truth[order])
            )
            wins = (above * (np.cumsum(below, axis=1) - below / 2)).sum(axis=1)
            with np.errstate(invalid="ignore"):
                found.append(wins / (above.sum(axis=1) * below.sum(axis=1)))
        return np.concatenate(found)

    def _weights(self, order: NDArray[np.int64]) -> Iterator[NDArray[np.float64]]:
        """How often the images in some order are drawn, some replicates at a time."""
        for begin in range(0, len(self.draws), _BLOCK):
            yield self.draws[begin : begin + _BLOCK, self.patient[order]].astype(np.float64)


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
    draws = np.zeros((replicates, len(place)), np.uint8)
    for columns in members.values():
        size = len(columns)
        draws[:, columns] = random.multinomial(size, np.full(size, 1 / size), replicates)
    return Replicates(draws, np.array([place[name] for name in patients], np.int64))


def interval(values: Values) -> list[float] | None:
    """The percentile interval of a figure; None where no replicate has it."""
    found = values[np.isfinite(values)]
    if not len(found):
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return [round(float(low), 6), round(float(high), 6)]
