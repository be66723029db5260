"""Shortcuts: how well a class can be told without looking at a lung."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrdist.errors import CxrdistError

FOLDS = 5
Target = NDArray[np.int8]
Fold = tuple[NDArray[np.int64], NDArray[np.int64]]  # places of the images: training, test


def measure_shortcut(
    features: Sequence[Mapping[str, float]],
    targets: NDArray[np.int8],
    groups: Sequence[int],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Tell each class against the rest by a logistic regression, cross-validated by patient.

    Args:
        features: of each image, all with the same names.
        targets: int8 [N, classes], 1 where an image has the label, 0 where not, -1 where that is
            not known; such images do not count for the class.
        groups: a number for each image; images of one number stay in one fold.
        classes: names of the columns.

    Returns:
        The names of the features, the number of folds, and for each class its AUROC (chance: 0.5)
        with a 95 % interval, None where a class has too few patients.

    Raises:
        CxrdistError: there are fewer than `FOLDS` groups.
    """
    if len(set(groups)) < FOLDS:
        raise CxrdistError(
            f"there are fewer than {FOLDS} patients (those of the same image count as one)"
        )
    from sklearn.model_selection import GroupKFold

    values = np.array([list(row.values()) for row in features])
    folds = list(GroupKFold(FOLDS, shuffle=True, random_state=0).split(values, groups=groups))
    return {
        "features": list(features[0]),
        "folds": FOLDS,
        "auroc": {
            name: _judge(values, target, np.asarray(groups), folds)
            for name, target in zip(classes, targets.T, strict=True)
        },
    }


def _judge(
    values: NDArray[np.float64], target: Target, groups: NDArray[np.int64], folds: Sequence[Fold]
) -> dict[str, float] | None:
    """Return the AUROC of one class over the images of which it is known, None of too few."""
    known = target >= 0
    place = np.cumsum(known) - 1
    folds = [(place[train[known[train]]], place[test[known[test]]]) for train, test in folds]
    folds = [(train, test) for train, test in folds if len(test)]
    values, target, groups = values[known], target[known], groups[known]
    return _score(values, target, folds) if _has_enough_patients(target, groups, folds) else None


def _has_enough_patients(target: Target, groups: NDArray[np.int64], folds: Sequence[Fold]) -> bool:
    """Return whether the class and the rest have a patient per fold, and are in each training."""
    return all(len(set(groups[target == side])) >= FOLDS for side in (0, 1)) and all(
        len(set(target[train])) == 2 for train, _ in folds
    )


def _score(values: NDArray[np.float64], target: Target, folds: Sequence[Fold]) -> dict[str, float]:
    """Return the AUROC of one class, float64 [N, features] against int8 [N]."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    found = cross_val_predict(model, values, target, cv=folds, method="predict_proba")[:, 1]
    return _interval(float(roc_auc_score(target, found)), int(target.sum()), len(target))


def _interval(auroc: float, positives: int, images: int) -> dict[str, float]:
    """The AUROC with 1.96 standard errors around it (Hanley & McNeil 1982, equation 1)."""
    negatives = images - positives
    first, second = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = (
        auroc * (1 - auroc)
        + (positives - 1) * (first - auroc**2)
        + (negatives - 1) * (second - auroc**2)
    ) / (positives * negatives)
    reach = 1.96 * variance**0.5
    return {
        "value": round(auroc, 4),
        "low": round(max(0.0, auroc - reach), 4),
        "high": round(min(1.0, auroc + reach), 4),
    }
