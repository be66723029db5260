"""Calibration: a temperature per class, and how far probabilities are from observed frequencies.

Each class is calibrated against the rest by its own logit, as the network was trained.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypedDict

import numpy as np
import scipy  # loads submodules on first use
from numpy.typing import NDArray
from scipy.special import expit

from cxrdist.bootstrap import Limits, Replicates, Values, interval
from cxrdist.data.labels import POSITIVE
from cxrdist.documents import Between, Real, Share, Text
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.operating_points import (
    YOUDEN,
    ChosenOn,
    Interval,
    Rule,
    choose_threshold,
    chosen_on,
    operating_table,
    read_rule,
)
from cxrdist.evaluate.scored import Scored
from cxrdist.info import Count
from cxrdist.intervals import QUANTILE, bounded, of_share
from cxrdist.model.description import Calibration
from cxrdist.terminal import counted, table, with_limits

BINS = 15  # as in Guo et al. 2017, section 2
Shares = Annotated[list[Share], Between(1, 100)]
LEAST, MOST = 0.01, 100.0  # temperatures


def rule_to_apply(
    stored: Calibration | None, asked: Rule | None, fewest: int, own_sha256: str | None
) -> Rule | None:
    """Return the rule by which the model must be calibrated now; None to keep its calibration.

    Without --operating-point (`asked`) it is the model's own rule, at first youden. For other
    shards than the model's own, `own_sha256`, the sha256 of their index, is None.

    Raises:
        CxrdistError: these shards cannot give the rule that was asked for.
    """
    rule = asked or read_rule(stored.rule if stored else YOUDEN)
    if own_sha256 is None:
        if asked and stored and stored.rule != str(asked):
            raise CxrdistError(
                f"--operating-point {asked}: the model has thresholds by {stored.rule}, and new "
                "ones can only be chosen on its own validation split; evaluate its own shards with "
                f"--operating-point {asked} first"
            )
        return None
    present = (str(rule), fewest, own_sha256)
    if stored and (stored.rule, stored.fewest, stored.index_sha256) == present:
        return None
    return rule


def choose_calibration(scored: Scored, rule: Rule, fewest: int, index_sha256: str) -> Calibration:
    """Choose temperatures and thresholds on the images of a validation split.

    A class with fewer than `fewest` positives, or negatives, gets neither.
    """
    temperatures: dict[str, float] = {}
    thresholds: dict[str, float] = {}
    reasons: dict[str, list[str]] = {name: [] for name in scored.classes}
    for column, name in enumerate(scored.classes):
        known = scored.targets[:, column] >= 0
        truth, logits = scored.targets[known, column] == POSITIVE, scored.logits[known, column]
        positives, negatives = int(truth.sum()), int((~truth).sum())
        if min(positives, negatives) < fewest:
            reasons[name].append(
                f"val has {counted(positives, 'image')} with it and {negatives} without, "
                f"expected at least {fewest} of each"
            )
            continue
        if (temperature := fit_temperature(logits, truth)) is None:
            reasons[name].append(
                f"no temperature from {LEAST:g} to {MOST:g} fits its logits on val"
            )
        else:
            temperatures[name] = temperature
        if np.isinf(threshold := choose_threshold(logits, truth, rule)):
            reasons[name].append(f"on val {rule} is best met by never calling it")
        else:
            thresholds[name] = threshold
    joined = {name: " and ".join(texts) for name, texts in reasons.items() if texts}
    patients = len(set(scored.patients))
    return Calibration(
        temperatures, str(rule), thresholds, joined, fewest, index_sha256, len(scored), patients
    )


def fit_temperature(logits: NDArray[np.float64], truth: NDArray[np.bool_]) -> float | None:
    """Fit the temperature of one class to n logits and truths (Guo et al. 2017, section 4).

    It minimises the negative log-likelihood. Platt's targets (1999, section 2.2), slightly below 1
    and above 0, replace the truth, because a class that its logit separates perfectly would have no
    finite temperature.

    Returns:
        The temperature; None if the best one is not between `LEAST` and `MOST`, for example if the
        logit falls where the class is present.
    """
    positives, negatives = int(truth.sum()), int((~truth).sum())
    target = np.where(truth, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float(np.mean(np.logaddexp(0, scaled) - target * scaled))

    # The loss is convex in 1 / temperature, so it has one minimum on any scale.
    bounds = np.log(LEAST), np.log(MOST)
    best = scipy.optimize.minimize_scalar(
        loss, bounds=bounds, method="bounded", options={"xatol": 1e-7}
    ).x
    # If the best value is beyond a bound, the search ends 2e-7 short of it.
    inside = bounds[0] + 1e-3 < best < bounds[1] - 1e-3
    return float(np.exp(best)) if inside else None


class Errors(TypedDict):
    """Distances between probabilities and the truth."""

    calibration_error: Share
    calibration_error_interval: Interval
    chance_error: Share
    """Calibration error that perfect probabilities would have by chance on the same images."""
    brier: Share
    brier_interval: Interval


class Bins(TypedDict):
    """The bins of a class: one value per bin."""

    images: Annotated[list[Count], Between(1, 100)]
    probability: Shares
    """Mean of the network's probabilities."""
    calibrated: Shares | None
    """Mean of the calibrated probabilities."""
    positives: Shares
    """Share of images with the class."""
    positives_interval: Annotated[list[Interval], Between(1, 100)]


class ClassCalibration(TypedDict):
    """The calibration of a class, over the images for which the class is known."""

    known: Count
    positives: Count
    temperature: Real | None
    before: Errors
    after: Errors | None
    """With the temperature."""
    bins: Bins


class CalibrationFigures(TypedDict):
    """The member ``calibration`` of metrics.json."""

    chosen_on: ChosenOn | None
    """None if the model has no temperatures: its validation split was not evaluated."""
    classes: dict[str, ClassCalibration]
    """Classes that are known for at least one image."""
    mean_of: list[str]
    """Classes with a temperature; all classes if none has one."""
    mean_before: Errors | None
    mean_after: Errors | None
    reasons: dict[str, Text]
    """Why a class has no temperature, by class."""


def calibration_figures(
    scored: Scored, replicates: Replicates, calibration: Calibration | None
) -> CalibrationFigures:
    """Measure the calibration of each class, before and after its temperature.

    The expected calibration error is the mean distance between probability and share of positives
    over `BINS` bins of equal size (equal logits share a bin). It is biased upwards: even with
    perfect probabilities the share of positives in a bin differs from their mean by chance.
    ``chance_error`` estimates this error of perfect probabilities from the distances between the
    bins of the replicates and those of the images. Resampling patients adds the same bias again, so
    the replicates are shifted to have the measured error as their mean. The interval begins at the
    least error that gives the measured one by chance (`_least_error`), which may be 0.
    """
    temperatures = calibration.temperatures if calibration else {}
    classes: dict[str, ClassCalibration] = {}
    before: dict[str, _Figures] = {}
    after: dict[str, _Figures] = {}
    for column, name in enumerate(scored.classes):
        binned = _bin(scored, column, temperatures.get(name), replicates)
        if binned is not None:
            before[name] = _errors(binned, 0)
            if name in temperatures:
                after[name] = _errors(binned, 1)
            classes[name] = _describe(binned, temperatures.get(name), before[name], after.get(name))
    # Both means are over the same classes, so that before and after can be compared.
    mean_of = [*after] or [*before]
    return {
        "chosen_on": chosen_on(calibration) if calibration else None,
        "classes": classes,
        "mean_of": mean_of,
        "mean_before": _written(_mean([before[name] for name in mean_of])) if mean_of else None,
        "mean_after": _written(_mean([*after.values()])) if after else None,
        "reasons": {
            name: calibration.reasons.get(name, "the model has no temperature for it")
            for name in scored.classes
            if calibration and name not in temperatures
        },
    }


@dataclass(frozen=True)
class _Binned:
    """The images for which a class is known, in bins by its logit.

    There are one or two kinds of probabilities: the network's and, with a temperature, the
    calibrated ones.

    Attributes:
        patients: number of patients of the images.
        images: counts, float [1 + replicates, bins]; row 0 is the images, then each replicate.
        positives: counts, as `images`.
        positives_interval: interval of the share of positives in each bin.
        sums: sums of the probabilities, as `images`, one array per kind.
        squares: summed squared distances from the truth, float [1 + replicates], one per kind.
    """

    patients: int
    images: NDArray[np.float64]
    positives: NDArray[np.float64]
    positives_interval: list[Limits | None]
    sums: list[NDArray[np.float64]]
    squares: list[NDArray[np.float64]]


def _bin(
    scored: Scored, column: int, temperature: float | None, replicates: Replicates
) -> _Binned | None:
    """Sum up the images of each bin; return None if the class is known for no image."""
    known = scored.targets[:, column] >= 0
    if not known.any():
        return None
    logits, truth = scored.logits[known, column], scored.targets[known, column] == POSITIVE
    probabilities = [expit(logits / value) for value in (1.0, temperature) if value]
    # Edges are logits of images: equal logits share a bin, and some bins may have no image.
    edges = np.quantile(logits, np.arange(1, BINS) / BINS, method="inverted_cdf")
    # np.unique numbers the bins that have images.
    _, bins = np.unique(np.searchsorted(edges, logits), return_inverse=True)
    inside = np.eye(bins.max() + 1)[bins]
    of_bins = [inside, *(inside * values[:, None] for values in (truth, *probabilities))]
    squares = np.stack([(values - truth) ** 2 for values in probabilities], 1)
    # The replicates expect a row for each image; those of unknown images add nothing.
    summed = np.zeros((len(scored), len(of_bins) * inside.shape[1] + squares.shape[1]))
    summed[known] = np.hstack([*of_bins, squares])
    totals = np.vstack([summed.sum(axis=0), replicates.sums(summed)])
    blocks = np.split(totals, np.arange(1, len(of_bins) + 1) * inside.shape[1], axis=1)
    images, positives, *sums, squared = blocks
    with np.errstate(invalid="ignore"):
        shares = (positives[1:] / images[1:]).T
    has, bin_of = scored.targets[:, column] == POSITIVE, np.full(len(scored), -1)
    bin_of[known] = bins
    within = [of_share(replicates, has, bin_of == i, values) for i, values in enumerate(shares)]
    patients = replicates.patients(known)
    return _Binned(patients, images, positives, within, sums, [*squared.T])


class _Figures(NamedTuple):
    """Errors of one kind of probabilities; row or value 0 is for the images, then the replicates.

    Attributes:
        distances: share of positives minus mean probability of each bin, times the bin's share of
            the images, float64 [1 + replicates, bins]; their absolute values add up to the error.
        brier: Brier scores, float64 [1 + replicates].
        patients: number of patients behind the errors; for a mean, that of the class with the
            fewest.
    """

    distances: NDArray[np.float64]
    brier: Values
    patients: int


def _errors(binned: _Binned, kind: int) -> _Figures:
    """Compute the errors of one kind of probabilities, by its position in `_Binned.sums`."""
    images = binned.images.sum(axis=1)
    with np.errstate(invalid="ignore"):
        distances = (binned.positives - binned.sums[kind]) / images[:, None]
        return _Figures(distances, binned.squares[kind] / images, binned.patients)


def _mean(figures: Sequence[_Figures]) -> _Figures:
    distances, brier, patients = zip(*figures, strict=True)
    # The mean error is the error of all bins together, each with a share of 1 / classes.
    return _Figures(np.hstack(distances) / len(figures), np.mean(brier, axis=0), min(patients))


def _written(figures: _Figures) -> Errors:
    distances, brier, patients = figures
    error, *drawn = np.abs(distances).sum(axis=1)
    chance = distances[1:] - distances[0]
    within = interval(np.clip(drawn - np.nanmean(drawn) + error, 0, 1))
    if within:
        within[0] = min(within[0], round(_least_error(distances[0], chance), 6))
    return {
        "calibration_error": round(float(error), 6),
        "calibration_error_interval": within,
        "chance_error": round(float(np.nanmean(np.abs(chance).sum(axis=1))), 6),
        "brier": round(float(brier[0]), 6),
        "brier_interval": bounded(float(brier[0]), brier[1:], patients),
    }


def _least_error(distances: NDArray[np.float64], chance: NDArray[np.float64]) -> float:
    """Return the least true calibration error that explains the measured one.

    True distances are taken to be the measured ones [bins], all nearer to 0 by the same number of
    their standard errors. They explain the measured error if chance, float64 [replicates, bins],
    adds as much in more than 2.5 of 100 data sets. In a simulation of three classes of 60 patients,
    where chance adds half to the mean error, its interval holds the truth in 97 of 100 cases; the
    replicates alone, in 25.
    """
    sizes, chance = np.abs(distances), chance[np.isfinite(chance).all(axis=1)]
    spread = chance.std(axis=0)
    varies = spread > 0
    # Numbers of standard errors: from the least that makes all distances 0 down to none.
    nearer = np.linspace((sizes[varies] / spread[varies]).max(initial=0), 0, 101)

    def left(step: int) -> NDArray[np.float64]:
        return np.sign(distances) * np.clip(sizes - nearer[step] * spread, 0, None)

    def explains(step: int) -> bool:
        errors = np.abs(left(step) + chance).sum(axis=1)
        return bool(np.quantile(errors, QUANTILE) >= sizes.sum())

    return float(np.abs(left(bisect_left(range(100), True, key=explains))).sum())


def _describe(
    binned: _Binned, temperature: float | None, before: _Figures, after: _Figures | None
) -> ClassCalibration:
    """Write the calibration of a class, before and, if it has a temperature, after."""
    images, positives = binned.images, binned.positives
    means = [np.round(sums[0] / images[0], 6).tolist() for sums in binned.sums]
    return {
        "known": int(images[0].sum()),
        "positives": int(positives[0].sum()),
        "temperature": temperature,
        "before": _written(before),
        "after": _written(after) if after else None,
        "bins": {
            "images": images[0].astype(np.int64).tolist(),
            "probability": means[0],
            "calibrated": means[1] if temperature else None,
            "positives": np.round(positives[0] / images[0], 6).tolist(),
            "positives_interval": binned.positives_interval,
        },
    }


def describe_calibration(metrics: Mapping[str, Any]) -> str:
    """Format the calibration and the operating points of a split for the terminal."""
    calibration, points = metrics["calibration"], metrics.get("operating_points")
    if points is None:
        return (
            "no temperatures and no operating points: `cxrdist evaluate` chooses them on the "
            "validation split of the shards that the model was trained on; an ensemble of folds "
            "has no such split"
        )
    val = points["chosen_on"]
    where = f"chosen on val ({val['images']} images of {val['patients']} patients)"
    reasons = points["reasons"] | calibration["reasons"]
    return "\n".join(
        [
            f"\nOperating points by {points['rule']}, {where}; from: probability",
            operating_table(points) if points["classes"] else "no class has a threshold",
            f"\nCalibration with a temperature for each class, {where}",
            calibration_table(calibration),
            *(f"{name}: {reason}" for name, reason in reasons.items()),
            "",
        ]
    )


def calibration_table(figures: CalibrationFigures) -> str:
    """Format the calibration errors with their 95 % intervals for the terminal."""
    rows = []
    for name, values in figures["classes"].items():
        temperature = "-" if values["temperature"] is None else f"{values['temperature']:.3g}"
        rows.append([name, temperature, *map(_cell, (values["before"], values["after"]))])
    if figures["mean_before"]:
        errors = figures["mean_before"], figures["mean_after"]
        rows.append([f"Mean of {len(figures['mean_of'])}", "", *map(_cell, errors)])
    headers = ("Class", "Temperature", "Calibration error", "with temperature")
    return table(rows, headers)


def _cell(errors: Errors | None) -> str:
    if errors is None:
        return "-"
    return with_limits(errors["calibration_error"], errors["calibration_error_interval"])
