"""Mistakes: the images that a model got wrong, the surest first."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.labels import NEGATIVE, POSITIVE
from cxrdist.evaluate.metrics import THRESHOLD_LOGIT
from cxrdist.evaluate.scored import Scored

MOST_PICTURED = 200
"""Mistakes that have a picture. At 224 px, with two heat maps each, they are 20 MB of a page."""


class Mistake(NamedTuple):
    """An image that was got wrong."""

    place: int
    """Of the image in its `Scored`."""
    missed: list[str]
    """Labels that it has and that were not called."""
    called: list[str]
    """Labels that were called and that it has not."""


def find_mistakes(scored: Scored, thresholds: Mapping[str, float] | None = None) -> list[Mistake]:
    """List the images that were got wrong.

    With one class per image these are the images whose likeliest class is not theirs. The surest
    comes first, that with the largest logit.

    With several labels an image is wrong in each known label that it has and that is not called,
    or that is called and that it has not. The labels take turns, each with its surest false
    positive and its surest false negative: that whose logit is farthest from the threshold.

    Ties keep the order of the images.

    Args:
        scored: N images.
        thresholds: logits from which on a label is called, as in `Calibration`; without one it is
            called from a probability of 0.5 on. With one class per image they mean nothing.
    """
    truth, known = scored.targets == POSITIVE, scored.targets >= NEGATIVE
    several = scored.task == "multilabel"
    limits = [(thresholds or {}).get(name, THRESHOLD_LOGIT) for name in scored.classes]
    margins = scored.logits - np.array(limits)
    if several:
        called = margins >= 0
    else:
        called = scored.logits.argmax(axis=1)[:, None] == np.arange(len(scored.classes))
    missed, wrongly = known & truth & ~called, known & called & ~truth
    if several:
        order = _in_turn(np.abs(margins), wrongly, missed)
    else:
        wrong = np.flatnonzero(wrongly.any(axis=1))
        order = wrong[np.argsort(-scored.logits[wrong].max(axis=1), kind="stable")]
    names = np.array(scored.classes, dtype=object)
    return [Mistake(i, list(names[missed[i]]), list(names[wrongly[i]])) for i in order.tolist()]


def _in_turn(sureness: NDArray[np.float64], *kinds: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Order images by kinds of mistakes in turn: the surest of each label and kind, then the next.

    Args:
        sureness: float64 [N, classes].
        kinds: where an image has a mistake of the kind, bool [N, classes] each.

    Returns:
        int64 [n], each image once.
    """
    images, ranks = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for label in range(sureness.shape[1]):
        for kind in kinds:
            wrong = np.flatnonzero(kind[:, label])
            images.append(wrong[np.argsort(-sureness[wrong, label], kind="stable")])
            ranks.append(np.arange(len(wrong)))
    in_turn = np.concatenate(images)[np.argsort(np.concatenate(ranks), kind="stable")]
    _, first = np.unique(in_turn, return_index=True)
    return in_turn[np.sort(first)]
