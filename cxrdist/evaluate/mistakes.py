"""Mistakes: the images that a model got wrong, the most confident first."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.labels import NEGATIVE, POSITIVE
from cxrdist.evaluate.scored import Scored
from cxrdist.model.prediction import THRESHOLD_LOGIT, call

MOST_PICTURED = 200
"""Number of mistakes with pictures. At 224 px, with two heat maps each, they take 20 MB."""


class Mistake(NamedTuple):
    """An image that the model got wrong."""

    position: int
    """Position of the image in its `Scored`."""
    missed: list[str]
    """Labels that the image has but that were not called."""
    called: list[str]
    """Labels that were called but that the image does not have."""


def find_mistakes(scored: Scored, thresholds: Mapping[str, float] | None = None) -> list[Mistake]:
    """List the images that the model got wrong.

    With one class per image, a mistake is an image whose likeliest class is not its own. The most
    confident, with the largest logit, comes first.

    With several labels, an image is a mistake for each known label that is missed or called in
    error. The labels take turns, each with its most confident false positive and false negative,
    whose logit is farthest from the threshold.

    Ties keep the order of the images.

    `thresholds` are logits at or above which a label is called, as in `Calibration`; a label
    without one is called from a probability of 0.5 on. With one class per image they are not used.
    """
    truth, known = scored.targets == POSITIVE, scored.targets >= NEGATIVE
    several = scored.task == "multilabel"
    limits = np.array([(thresholds or {}).get(name, THRESHOLD_LOGIT) for name in scored.classes])
    called = call(scored.logits, limits) if several else scored.predicted
    missed, wrongly = known & truth & ~called, known & called & ~truth
    if several:
        order = _in_turn(np.abs(scored.logits - limits), wrongly, missed)
    else:
        wrong = np.flatnonzero(wrongly.any(axis=1))
        order = wrong[np.argsort(-scored.logits[wrong].max(axis=1), kind="stable")].tolist()
    names = np.array(scored.classes, dtype=object)
    return [Mistake(i, list(names[missed[i]]), list(names[wrongly[i]])) for i in order]


def _in_turn(sureness: NDArray[np.float64], *kinds: NDArray[np.bool_]) -> list[int]:
    """Order images round-robin, each once: of each label and kind the most confident comes first.

    Args:
        sureness: distance from the threshold, float64 [N, classes].
        kinds: masks of the mistakes of each kind, bool [N, classes].
    """
    queues: list[list[int]] = []
    for label in range(sureness.shape[1]):
        for kind in kinds:
            wrong = np.flatnonzero(kind[:, label])
            queues.append(wrong[np.argsort(-sureness[wrong, label], kind="stable")].tolist())
    in_turn = (image for turn in zip_longest(*queues) for image in turn if image is not None)
    return list(dict.fromkeys(in_turn))
