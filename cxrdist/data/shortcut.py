"""Shortcuts: how well a class can be told without looking at a lung."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDS = 5


def measure_shortcut(
    features: Sequence[Mapping[str, float]],
    targets: NDArray[np.uint8],
    groups: Sequence[int],
    classes: Sequence[str],
) -> dict[str, Any] | None:
    """Tell each class against the rest by a logistic regression, cross-validated by patient.

    Args:
        features: of each image, all with the same names.
        targets: uint8 [N, classes], 1 where an image has the label.
        groups: a number for each image; images of one number stay in one fold.
        classes: names of the columns.

    Returns:
        The names of the features, the number of folds, and for each class its AUROC (chance: 0.5)
        with a 95 % interval, None where a class has too few images; None for fewer than `FOLDS`
        groups.
    """
    if len(set(groups)) < FOLDS:
        return None
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    values = np.array([list(row.values()) for row in features])
    model = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression(max_iter=1000)))
    usable = [i for i in range(len(classes)) if _in_all_folds(targets[:, i], groups)]
    scores: dict[str, dict[str, float] | None] = dict.fromkeys(classes)
    if usable:
        folds = GroupKFold(FOLDS, shuffle=True, random_state=0)
        truth = targets[:, usable]
        probabilities = cross_val_predict(
            model, values, truth, groups=groups, cv=folds, method="predict_proba"
        )
        for place, i in enumerate(usable):
            auroc = float(roc_auc_score(truth[:, place], probabilities[:, place]))
            scores[classes[i]] = _interval(auroc, int(truth[:, place].sum()), len(truth))
    return {"features": list(features[0]), "folds": FOLDS, "auroc": scores}


def _in_all_folds(target: NDArray[np.uint8], groups: Sequence[int]) -> bool:
    """Whether the images of a class, and the others, are of enough patients to be learnt from."""
    numbers = np.asarray(groups)
    return all(len(set(numbers[target == side])) >= FOLDS for side in (0, 1))


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
