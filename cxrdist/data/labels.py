"""Labels: what is known of each label of an image.

A label is stated to be there or absent, is uncertain (-1 or U of a report's labeller), or is
missing (an empty cell): not looked for, or not mentioned.
"""

from collections.abc import Iterable, Mapping

from cxrdist.errors import CxrdistError

SEPARATOR = "|"  # between the labels of an image, as in ChestX-ray14
# Of a cell of a matrix of labels; what is below 0 is not known.
POSITIVE, NEGATIVE, UNCERTAIN, MISSING = 1, 0, -1, -2
CELLS = {
    **dict.fromkeys(("1", "1.0"), POSITIVE),
    **dict.fromkeys(("0", "0.0"), NEGATIVE),
    **dict.fromkeys(("-1", "-1.0", "u"), UNCERTAIN),
    "": MISSING,
}


def labels_of(label: str) -> list[str]:
    """The labels that a text of labels with ``|`` between them holds."""
    return label.split(SEPARATOR) if label else []


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
