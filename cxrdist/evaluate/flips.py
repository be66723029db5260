"""The images that two models decide differently."""

from typing import NamedTuple

import numpy as np

from cxrdist.data.labels import POSITIVE
from cxrdist.evaluate.scored import Scored

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
    find = _label_flips if a.task == "multilabel" else _class_flips
    return sorted(
        find(a, b),
        key=lambda flip: (
            CHANGES.index(flip.change),
            -abs(flip.logits[1] - flip.logits[0]),
            a.keys[flip.position],
        ),
    )


def _class_flips(a: Scored, b: Scored) -> list[Flip]:
    guesses = a.predicted.argmax(axis=1), b.predicted.argmax(axis=1)
    truth = (a.targets == POSITIVE).argmax(axis=1)
    flipped = []
    for position in np.flatnonzero(guesses[0] != guesses[1]).tolist():
        first, second, own = (int(values[position]) for values in (*guesses, truth))
        change = "right->wrong" if first == own else "wrong->right" if second == own else CHANGES[2]
        names = a.classes[first], a.classes[second]
        logits = float(a.logits[position, own]), float(b.logits[position, own])
        flipped.append(Flip(position, change, a.classes[own], names, logits))
    return flipped


def _label_flips(a: Scored, b: Scored) -> list[Flip]:
    guesses = a.predicted, b.predicted
    flipped = (guesses[0] != guesses[1]) & (a.targets >= 0)
    changes = []
    for position, column in zip(*(axis.tolist() for axis in np.nonzero(flipped)), strict=True):
        first, second = (bool(guess[position, column]) for guess in guesses)
        is_first_right = first == (a.targets[position, column] == POSITIVE)
        change = "right->wrong" if is_first_right else "wrong->right"
        names = tuple("yes" if guess else "no" for guess in (first, second))
        logits = float(a.logits[position, column]), float(b.logits[position, column])
        changes.append(Flip(position, change, a.classes[column], (names[0], names[1]), logits))
    return changes
