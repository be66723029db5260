"""The images that two models decide differently."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.labels import POSITIVE
from cxrdist.evaluate.scored import Scored

# Flips are sorted in this order.
CHANGES = ("right->wrong", "wrong->right", "wrong->wrong")


class Flip(NamedTuple):
    """An image, or one label of an image, that the models decide differently."""

    position: int
    """Position of the image in both `Scored`."""
    change: str
    """right->wrong, wrong->right or wrong->wrong."""
    of: str
    """The class of the logits: the true class, or the label that flipped."""
    predicted: tuple[str, str]
    logits: tuple[float, float]


def flips(a: Scored, b: Scored) -> list[Flip]:
    """List the images that the models decide differently, those that got worse first.

    With several labels per image, list each known label that is decided differently. Within a kind
    of change the largest difference of the logits comes first.
    """
    several, truth = a.task == "multilabel", a.targets == POSITIVE
    decisions = a.predicted, b.predicted
    differs = decisions[0] != decisions[1]
    if several:
        positions, columns = np.nonzero(differs & (a.targets >= 0))
    else:
        positions = np.flatnonzero(differs.any(axis=1))
        columns = truth.argmax(axis=1)[positions]

    def name(chosen: NDArray[np.bool_], column: int) -> str:
        if several:
            return "yes" if chosen[column] else "no"
        return a.classes[int(chosen.argmax())]

    flipped = []
    for position, column in zip(positions.tolist(), columns.tolist(), strict=True):
        is_right = [chosen[position, column] == truth[position, column] for chosen in decisions]
        change = "->".join("right" if own else "wrong" for own in is_right)
        first, second = (name(chosen[position], column) for chosen in decisions)
        logits = float(a.logits[position, column]), float(b.logits[position, column])
        flipped.append(Flip(position, change, a.classes[column], (first, second), logits))
    return sorted(
        flipped,
        key=lambda flip: (
            CHANGES.index(flip.change),
            -abs(flip.logits[1] - flip.logits[0]),
            a.keys[flip.position],
        ),
    )
