"""Labels: what is known about each label of an image.

A label is present, absent, uncertain (-1 or U from a labeller of reports), or missing (an empty
cell): not looked for, or not mentioned.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cxrdist.errors import CxrdistError, choices

SEPARATOR = "|"  # between the labels of an image, as in ChestX-ray14
# Codes of the cells of a label matrix; below 0 the label is not known.
POSITIVE, NEGATIVE, UNCERTAIN, MISSING = 1, 0, -1, -2
# Fields of a record and of a sample: labels that its source does not state. The order is the
# precedence where labels are merged (`cxrdist.data.label_map`).
NotStated = Literal["uncertain", "missing", "assumed_absent"]
NOT_STATED: tuple[NotStated, ...] = get_args(NotStated)
CELLS = {
    **dict.fromkeys(("1", "1.0", "1,0"), POSITIVE),  # some spreadsheets write a decimal comma
    **dict.fromkeys(("0", "0.0", "0,0"), NEGATIVE),
    **dict.fromkeys(("-1", "-1.0", "-1,0", "u"), UNCERTAIN),
    "": MISSING,
}
# What uncertain labels may count as in training; U-Ones and U-Zeros of Irvin et al. 2019.
COUNTS_AS = {"ignore": UNCERTAIN, "positive": POSITIVE, "negative": NEGATIVE}


def labels_of(label: str) -> list[str]:
    """Split a text of labels separated by ``|``."""
    return label.split(SEPARATOR) if label else []


def joined(*labels: str) -> str:
    """Join several texts of labels into one."""
    return SEPARATOR.join(filter(None, labels))


def label_matrix(columns: Mapping[int, Sequence[str]], classes: Sequence[str]) -> NDArray[np.int8]:
    """Return the codes of the labels of some images as a matrix, int8 [images, classes].

    ``columns`` has for each code the labels that have it, one text per image. Labels that no text
    names are `NEGATIVE`.
    """
    column_of = {name: i for i, name in enumerate(classes)}
    matrix = np.full((len(columns[POSITIVE]), len(column_of)), NEGATIVE, np.int8)
    for code, texts in columns.items():  # each distinct text is split once: there are few of them
        columns_of = {text: [column_of[label] for label in labels_of(text)] for text in {*texts}}
        rows = np.repeat(np.arange(len(texts)), [len(columns_of[text]) for text in texts])
        matrix[rows, [column for text in texts for column in columns_of[text]]] = code
    return matrix


def agree(images: Iterable[tuple[str, str]]) -> bool:
    """Return whether no label is present in one image and absent in another.

    Each image has the labels that are present, and those that are uncertain or missing, both
    separated by ``|``.
    """
    cells = [(set(labels_of(label)), set(labels_of(unknown))) for label, unknown in images]
    present = set[str]().union(*(labels for labels, _ in cells))
    return all(present <= labels | unknown for labels, unknown in cells)


def read_cells(where: str, cells: Mapping[str, str]) -> dict[str, str]:
    """Read a row of a table with a cell per label: 1, 0, -1 or U, or empty.

    ``where`` names file and row in messages.

    Returns:
        label, uncertain and missing, as `Record` has them; their labels in the order of ``cells``.

    Raises:
        CxrdistError: a cell is something else.
    """
    chosen: dict[int, list[str]] = {POSITIVE: [], NEGATIVE: [], UNCERTAIN: [], MISSING: []}
    for name, text in cells.items():
        cell = CELLS.get(text.strip().casefold())
        if cell is None:
            raise CxrdistError(f"{where}: {name} is {text!r:.40}, expected 1, 0, -1, U or empty")
        chosen[cell].append(name)
    # Absent labels need no field: they are the classes that no field names.
    return {
        "label": SEPARATOR.join(chosen[POSITIVE]),
        "uncertain": SEPARATOR.join(chosen[UNCERTAIN]),
        "missing": SEPARATOR.join(chosen[MISSING]),
    }


def read_uncertain(text: str) -> tuple[str, dict[str, str]]:
    """Parse --uncertain, such as ``positive,Edema=negative``.

    Returns:
        A key of `COUNTS_AS` for all labels, and one for each label that has its own.

    Raises:
        CxrdistError: the text is malformed, or names a label twice.
    """
    counts_as_of: dict[str, str] = {}
    # A plain split at commas fails: names may hold commas. An item ends with one of three words.
    for item in re.split(r"(?:(?<=ignore)|(?<=positive)|(?<=negative))\s*,", text):
        # From the right, since a name may hold an equals sign.
        name, equals, counts_as = (part.strip() for part in item.rpartition("="))
        if counts_as not in COUNTS_AS or name in counts_as_of or (equals and not name):
            raise CxrdistError(
                f"--uncertain: is {text!r:.200}, expected ignore, positive or negative, and for "
                "single labels NAME=positive and the like, separated by commas, each label once"
            )
        counts_as_of[name] = counts_as
    return counts_as_of.pop("", "ignore"), counts_as_of


def settle_uncertain(
    targets: NDArray[np.int8], classes: Sequence[str], text: str
) -> NDArray[np.int8]:
    """Replace uncertain labels by what --uncertain counts them as; those to ignore stay uncertain.

    ``targets`` are those of `Index.targets`, int8 [samples, classes], and so is the result.

    Raises:
        CxrdistError: the text is malformed, or names an unknown class.
    """
    default, by_label = read_uncertain(text)
    if stray := [name for name in by_label if name not in classes]:
        raise CxrdistError(
            f"--uncertain: no class {stray[0]!r} in the shards; {choices(stray[0], classes)}"
        )
    codes = [COUNTS_AS[by_label.get(name, default)] for name in classes]
    return np.where(targets == UNCERTAIN, np.array(codes, np.int8), targets)
