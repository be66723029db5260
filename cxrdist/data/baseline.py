"""The trivial baseline: scores of simple models on thumbnails that show hardly any disease.

Only a higher score of a network means something. On X-rays from several sources such models are
often right, since a thumbnail shows age, position, collimation and the hospital's processing.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.audit_file import Baseline
from cxrdist.data.fingerprint import THUMBNAIL_PX
from cxrdist.data.shortcut import FOLDS, Fold, Scores, fold_patients, is_scored, judge, out_of_fold
from cxrdist.info import Task

# Cross-validated accuracy on 3,157 X-rays like the paper's (paper_like): 0.926 by the regression,
# with a FREEDOM of 0.001 0.917; 0.94 by the perceptron, also with 100 epochs and with 64 units.
FREEDOM = 0.01  # of the logistic regression, scikit-learn's C
UNITS = 128  # of the perceptron's hidden layer
DECAY = 1.0  # scikit-learn's alpha
EPOCHS = 30
MOST_IMAGES = 10_000  # of more, those of patients drawn at random; minutes for 14 labels


def measure_baseline(
    thumbnails: Callable[[int], NDArray[np.uint8]],
    targets: NDArray[np.int8],
    groups: Sequence[int],
    classes: Sequence[str],
    task: Task,
) -> Baseline:
    """Predict the classes from thumbnails, cross-validated by patient as in `measure_shortcut`.

    At most `MOST_IMAGES` are used. The perceptron learns unknown labels as absent; they are never
    scored. ``thumbnails`` returns the result of `shrink` for an image by its position; the other
    arguments are those of `measure_shortcut`.

    Raises:
        CxrdistError: there are fewer patients than folds.
    """
    positions = choose_images(groups, MOST_IMAGES)
    chosen = [groups[i] for i in positions]
    folds = fold_patients(chosen)
    values = np.stack([thumbnails(int(i)).ravel() for i in positions]).astype(np.float32)
    truth = targets[positions]
    regression = out_of_fold(values, truth, chosen, folds, FREEDOM)
    usable = is_scored(regression)
    perceptron = _perceive(values, truth, folds, usable)
    return {
        "size_px": THUMBNAIL_PX,
        "folds": FOLDS,
        "images": len(positions),
        "of_images": len(groups),
        "patients": len({*chosen}),
        "largest_class": round(float((truth == 1).mean(axis=0).max(initial=0)), 4),
        "logistic_regression": judge(regression, truth, chosen, classes, task),
        "perceptron": judge(perceptron, truth, chosen, classes, task),
    }


def choose_images(groups: Sequence[int], most: int) -> NDArray[np.int64]:
    """Choose at most ``most`` images: all of randomly drawn patients, with a fixed seed.

    The result is their positions, int64, ascending.
    """
    numbers = np.unique(np.asarray(groups), return_inverse=True)[1]
    counts = np.bincount(numbers)
    drawn = np.random.default_rng(0).permutation(len(counts))
    kept = drawn[np.cumsum(counts[drawn]) <= most]
    return np.flatnonzero(np.isin(numbers, kept))


def _perceive(
    values: NDArray[np.floating[Any]],
    targets: NDArray[np.int8],
    folds: Sequence[Fold],
    usable: NDArray[np.bool_],
) -> Scores:
    """Score images by a perceptron with one hidden layer and one output per usable class.

    The scores are float64 [N, classes], NaN in the column of a class that has too few patients.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    scores = np.full(targets.shape, np.nan)
    if not usable.any():
        return scores
    learnt = (targets[:, usable] == 1).astype(np.int64)
    is_binary = learnt.shape[1] == 1
    # scikit-learn wants a single column as a vector, and returns a probability for both sides.
    learnt = learnt[:, 0] if is_binary else learnt
    network = MLPClassifier((UNITS,), alpha=DECAY, max_iter=EPOCHS, random_state=0)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the epochs are a choice
        for train, test in folds:
            # Without warm_start each fit begins anew: nothing is left of the other folds.
            model = make_pipeline(StandardScaler(), network).fit(values[train], learnt[train])
            predicted = model.predict_proba(values[test])
            scores[np.ix_(test, usable)] = predicted[:, 1:] if is_binary else predicted
    return scores
