"""Shortcuts: how well classes can be predicted without looking at the lungs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrdist.bootstrap import Limits, Replicates, Values, draw, rarest_class
from cxrdist.data.audit_file import Estimate, Judgement, Shortcut
from cxrdist.errors import CxrdistError
from cxrdist.info import Task
from cxrdist.intervals import of_auroc, of_mean, of_share

FOLDS = 5
Target = NDArray[np.int8]
Scores = NDArray[np.float64]  # [N, classes], higher speaks for the class; NaN where not known
Fold = tuple[NDArray[np.int64], NDArray[np.int64]]  # numbers of images: training, test


def measure_shortcut(
    features: Sequence[Mapping[str, float]],
    targets: NDArray[np.int8],
    groups: Sequence[int],
    classes: Sequence[str],
    task: Task,
) -> Shortcut:
    """Predict each class by a logistic regression on features, cross-validated by patient.

    Args:
        features: features of each image, all with the same names.
        targets: int8 [N, classes]: 1 if an image has the label, 0 if not, below 0 if not known;
            such images do not count for the class.
        groups: a number per image, that of its patient; images with the same number stay in one
            fold.
        classes: names of the columns.
        task: multiclass or multilabel; only multiclass has an accuracy.

    Raises:
        CxrdistError: there are fewer than `FOLDS` groups.
    """
    folds = fold_patients(groups)
    values = np.array([list(row.values()) for row in features])
    scores = out_of_fold(values, targets, groups, folds)
    return {
        "features": list(features[0]),
        "folds": FOLDS,
        **judge(scores, targets, groups, classes, task),
    }


def fold_patients(groups: Sequence[int]) -> list[Fold]:
    """Divide images into `FOLDS` folds, the images of a group into the same one.

    Raises:
        CxrdistError: there are fewer groups than folds.
    """
    from sklearn.model_selection import GroupKFold

    if len(set(groups)) < FOLDS:
        raise CxrdistError(
            f"there are fewer than {FOLDS} patients (those of the same image count as one)"
        )
    splitter = GroupKFold(FOLDS, shuffle=True, random_state=0)
    return list(splitter.split(np.zeros((len(groups), 1)), groups=groups))


def out_of_fold(
    values: NDArray[np.floating[Any]],
    targets: NDArray[np.int8],
    groups: Sequence[int],
    folds: Sequence[Fold],
    freedom: float = 1.0,
) -> Scores:
    """Score images by a logistic regression per class, trained on the other folds.

    ``values`` are [N, features], targets and groups those of `measure_shortcut`; ``freedom`` is
    scikit-learn's C, for standardised features.

    Returns:
        float64 [N, classes], log odds; NaN if the label is not known, and in the whole column of a
        class that has too few patients.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    numbers = np.asarray(groups)
    scores = np.full(targets.shape, np.nan)
    for column, target in zip(scores.T, targets.T, strict=True):
        known = target >= 0
        rows = np.cumsum(known) - 1  # row of each image among those with a known label
        own = [(rows[train[known[train]]], rows[test[known[test]]]) for train, test in folds]
        # A fold may hold no image whose label is known, and scikit-learn fails on an empty one.
        own = [(train, test) for train, test in own if len(test)]
        if _has_enough_patients(target[known], numbers[known], own):
            model = make_pipeline(StandardScaler(), LogisticRegression(C=freedom, max_iter=1000))
            # Small products: threads that wait for each other take ten times as long.
            with threadpool_limits(1):
                column[known] = cross_val_predict(
                    model, values[known], target[known], cv=own, method="decision_function"
                )
    return scores


def _has_enough_patients(target: Target, groups: NDArray[np.int64], folds: Sequence[Fold]) -> bool:
    """Return whether both outcomes have `FOLDS` patients, and each training set has both."""
    return all(len(set(groups[target == side])) >= FOLDS for side in (0, 1)) and all(
        len(set(target[train])) == 2 for train, _ in folds
    )


def is_scored(scores: Scores) -> NDArray[np.bool_]:
    """Return which classes a model could be trained for: bool [classes]."""
    return np.asarray(np.isfinite(scores).any(axis=0))


def judge(
    scores: Scores,
    targets: NDArray[np.int8],
    groups: Sequence[int],
    classes: Sequence[str],
    task: Task,
) -> Judgement:
    """Measure how well scores separate the classes, with 95 % intervals over patients.

    The scores are of models that have not seen the images, NaN if there is none; the other
    arguments are those of `measure_shortcut`. The accuracy is that of the class with the highest
    score.
    """
    scored = is_scored(scores)
    if not scored.any():
        return {"accuracy": None, "auroc": dict.fromkeys(classes), "mean_auroc": None}
    patients = [str(group) for group in groups]
    replicates = draw(patients, rarest_class(targets == 1, patients))
    aurocs = {
        name: _auroc(scores[:, i], targets[:, i], replicates)
        for i, name in enumerate(classes)
        if scored[i]
    }
    values, limits, drawn = zip(*aurocs.values(), strict=True)
    accuracy = None
    if task == "multiclass" and scored.sum() > 1:
        # A class without a model (NaN) is never the highest.
        right = np.nan_to_num(scores, nan=-np.inf).argmax(axis=1) == targets.argmax(axis=1)
        everywhere = np.ones_like(right)
        accuracy = _rounded(right.mean(), of_share(replicates, right, everywhere))
    return {
        "accuracy": accuracy,
        "auroc": {n: _rounded(*aurocs[n][:2]) if n in aurocs else None for n in classes},
        "mean_auroc": _rounded(np.mean(values), of_mean(values, limits, np.stack(drawn))),
    }


def _auroc(
    scores: NDArray[np.float64], target: Target, replicates: Replicates
) -> tuple[float, Limits, Values]:
    """Return the AUROC of one class over images with a known label, its interval and replicates."""
    from sklearn.metrics import roc_auc_score

    known = target >= 0
    truth, own_scores, own = target[known] == 1, scores[known], replicates.take(known)
    value, drawn = float(roc_auc_score(truth, own_scores)), own.auroc(own_scores, truth)
    return value, of_auroc(own, value, drawn, truth), drawn


def _rounded(value: float, limits: Limits | None) -> Estimate | None:
    """Round a figure with its interval."""
    if limits is None:
        return None
    low, high = limits
    return {"value": round(float(value), 4), "low": round(low, 4), "high": round(high, 4)}
