"""Folds by patient: another split of training and validation images per ensemble member."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.index import Index
from cxrdist.data.labels import labels_of
from cxrdist.errors import CxrdistError

MOST_FOLDS = 20
_SEED = 0  # all members of a cross-validation cut the same folds, whatever their own seed


def read_fold(text: str) -> tuple[int, int]:
    """Return the number of a fold, from 1 on, and that of all folds, from a text such as ``2/5``.

    Raises:
        CxrdistError: the text is not a valid fold.
    """
    match = re.fullmatch(r"(\d{1,2})/(\d{1,2})", text)
    number, total = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= total or not 2 <= total <= MOST_FOLDS:
        raise CxrdistError(
            f"--fold: is {text!r:.40}, expected NUMBER/COUNT such as 2/5, of 2 to {MOST_FOLDS} "
            "folds"
        )
    return number, total


def cut_fold(index: Index, text: str | None) -> Index:
    """Use one fold of the training and validation images, such as ``2/5``, as validation split.

    All images of a patient are in one fold, and the classes are spread over the folds as evenly as
    patients allow. The test split and all numbers and hashes are unchanged; None as the fold leaves
    all splits as they were packed.

    Raises:
        CxrdistError: there are fewer patients than folds, or the fold is invalid or empty.
    """
    if text is None:
        return index
    number, total = read_fold(text)
    numbers = [i for i, sample in enumerate(index.samples) if sample.split in ("train", "val")]
    patients = [index.samples[i].patient for i in numbers]
    if (num_patients := len(set(patients))) < total:
        raise CxrdistError(
            f"--fold: {total} folds need as many patients in train and val, "
            f"--shards {index.directory} have {num_patients}; take fewer folds"
        )
    from sklearn.model_selection import StratifiedGroupKFold

    cut = StratifiedGroupKFold(total, shuffle=True, random_state=_SEED)
    folds = list(cut.split(numbers, _strata(index, numbers, total), patients))
    held_out = {numbers[i] for i in folds[number - 1][1]}
    if not held_out:
        raise CxrdistError(
            f"--fold: {text} has no images, since few patients have most of them; take fewer folds"
        )
    names = {i: "val" if i in held_out else "train" for i in numbers}
    samples = [s._replace(split=names.get(i, s.split)) for i, s in enumerate(index.samples)]
    rule = f"{index.split}; of train and val fold {text} by patient"
    return replace(index, samples=samples, split=rule)


def _strata(index: Index, numbers: list[int], num_folds: int) -> NDArray[np.int64]:
    """Return the stratum of each sample, int64 [samples]: the rarest of its labels.

    Strata with fewer images than folds cannot be spread over them and join the largest one.
    """
    labels = [labels_of(index.samples[i].label) for i in numbers]
    images = Counter(label for of_image in labels for label in of_image)
    rarest = [min(of_image, key=lambda label: images[label], default="") for of_image in labels]
    sizes = Counter(rarest)
    largest = sizes.most_common(1)[0][0]
    # scikit-learn would warn about them, and refuse the split if all strata are so small.
    names = [name if sizes[name] >= num_folds else largest for name in rarest]
    return np.unique(names, return_inverse=True)[1]
