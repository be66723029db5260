"""Labels: what is known of each label of an image.

A label is stated to be there or absent, is uncertain (-1 or U of a report's labeller), or is
missing (an empty cell): not looked for, or not mentioned.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cxrdist.errors import CxrdistError, choices

SEPARATOR = "|"  # between the labels of an image, as in ChestX-ray14
# Of a cell of a matrix of labels; what is below 0 is not known.
POSITIVE, NEGATIVE, UNCERTAIN, MISSING = 1, 0, -1, -2
# Fields of a record and of a sample: labels that its source does not state.
NOT_STATED: tuple[Literal["uncertain", "missing", "assumed_absent"], ...] = (
    "uncertain",
    "missing",
    "assumed_absent",
)
CELLS = {
    **dict.fromkeys(("1", "1.0"), POSITIVE),
    **dict.fromkeys(("0", "0.0"), NEGATIVE),
    **dict.fromkeys(("-1", "-1.0", "u"), UNCERTAIN),
    "": MISSING,
}
# What an uncertain label may count as in training; U-Ones and U-Zeros of Irvin et al. 2019.
COUNTS_AS = {"ignore": UNCERTAIN, "positive": POSITIVE, "negative": NEGATIVE}


def labels_of(label: str) -> list[str]:
    """Return the labels that a text of labels with ``|`` between them holds."""
    return label.split(SEPARATOR) if label else []


def joined(*labels: str) -> str:
    """Return the labels of several such texts as one text."""
    return SEPARATOR.join(filter(None, labels))


def label_matrix(columns: Mapping[int, Sequence[str]], classes: Sequence[str]) -> NDArray[np.int8]:
    """Make a matrix of what is known of the labels of some images.

    Args:
        columns: by the code of a cell the labels that have it, a text for each image.
        classes: names of the columns.

    Returns:
        int8 [images, classes]; `NEGATIVE` where an image has a label in no text.
    """
    place = {name: i for i, name in enumerate(classes)}
    matrix = np.full((len(columns[POSITIVE]), len(place)), NEGATIVE, np.int8)
    for code, texts in columns.items():
        places = {text: [place[label] for label in labels_of(text)] for text in {*texts}}
        rows = np.repeat(np.arange(len(texts)), [len(places[text]) for text in texts])
        matrix[rows, [column for text in texts for column in places[text]]] = code
    return matrix


def agree(images: Iterable[tuple[str, str]]) -> bool:
    """Return whether no label is there in one image and absent in another.

    Args:
        images: labels of each, and those that are uncertain or missing, with ``|`` between them.
    """
    cells = [(set(labels_of(label)), set(labels_of(unknown))) for label, unknown in images]
    present = set[str]().union(*(labels for labels, _ in cells))
    return all(present <= labels | unknown for labels, unknown in cells)


def read_cells(where: str, cells: Mapping[str, str]) -> dict[str, str]:
    """Read a row of a table that has a column for each label: 1, 0, -1 or U, or empty.

    Args:
        where: file and row, for messages.
        cells: by label.

    Returns:
        label, uncertain and missing, as `Record` has them; their labels in the order of ``cells``.

    Raises:
        CxrdistError: a cell is something else.
    """
    chosen: dict[int, list[str]] = {POSITIVE: [], NEGATIVE: [], UNCERTAIN: [], MISSING: []}
    for name, text in cells.items():
        cell = CELLS.get(text.strip().casefold())
        if cell is None:
            raise CxrdistError(f"{where}: {name} is {text!r:.40}, expected 1, 0, -1, U or nothing")
        chosen[cell].append(name)
    return {
        "label": SEPARATOR.join(chosen[POSITIVE]),
        "uncertain": SEPARATOR.join(chosen[UNCERTAIN]),
        "missing": SEPARATOR.join(chosen[MISSING]),
    }


def read_uncertain(text: str) -> tuple[str, dict[str, str]]:
    """Read what uncertain labels count as, such as ``positive,Edema=negative``.

    Returns:
        A key of `COUNTS_AS` for all labels, and one for each label that has its own.

    Raises:
        CxrdistError: it says something else, or says it twice.
    """
    found: dict[str, str] = {}
    # Names may hold commas; an item ends with one of the three words.
    for item in re.split(r"(?:(?<=ignore)|(?<=positive)|(?<=negative))\s*,", text):
        name, equals, counts_as = (part.strip() for part in item.rpartition("="))
        if counts_as not in COUNTS_AS or name in found or (equals and not name):
            raise CxrdistError(
                f"--uncertain: is {text!r:.200}, expected ignore, positive or negative, once, and "
                "for labels of their own NAME=positive and the like, with commas between them"
            )
        found[name] = counts_as
    return found.pop("", "ignore"), found


def settle_uncertain(
    targets: NDArray[np.int8], classes: Sequence[str], text: str
) -> NDArray[np.int8]:
    """Let uncertain labels count as a recipe says.

    Args:
        targets: int8 [samples, classes], cells as `Index.targets` gives them.
        classes: names of the columns.
        text: as `read_uncertain` takes it.

    Returns:
        int8 [samples, classes]; labels that are to be ignored stay uncertain.

    Raises:
        CxrdistError: the text is malformed, or names no class.
    """
    default, by_label = read_uncertain(text)
    if stray := [name for name in by_label if name not in classes]:
        raise CxrdistError(
            f"--uncertain: no class {stray[0]!r} in the shards; {choices(stray[0], classes)}"
        )
    codes = [COUNTS_AS[by_label.get(name, default)] for name in classes]
    return np.where(targets == UNCERTAIN, np.array(codes, np.int8), targets)
