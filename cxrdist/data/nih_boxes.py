"""Boxes around findings on the NIH's X-rays, the images of ChestX-ray14 and RSNA.

Both sets give boxes in px of the published squares of 1024 px. For smaller copies a box is scaled
with its image. A copy that is not a square was cropped in an unknown way: its boxes are left out.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cxrdist.data.boxes import box_of
from cxrdist.data.findings import ROUNDING_PX, Finding
from cxrdist.data.found import look_at, without_suffix
from cxrdist.data.geometry import scaled
from cxrdist.data.pictures import picture_size
from cxrdist.data.records import Record
from cxrdist.data.tables import Table, plain, read_table
from cxrdist.errors import CxrdistError

SIDE_PX = 1024  # of the originals' both sides (README_CHESTXRAY.pdf of the NIH)
TABLE = "BBox_List_2017.csv"
OWN_TABLE = "boxes.csv"  # with the columns below, in px of the images that are here
COLUMNS = ("image", "label", "x", "y", "width", "height")
NIH_COLUMNS = ("imageindex", "findinglabel")  # the first two of TABLE
SPELLINGS = {"Infiltrate": "Infiltration"}  # TABLE has its own word for one label


@dataclass(frozen=True)
class Boxes:
    """The boxes of a table."""

    table: Path | None
    """The file; None if there is no table."""
    findings: Mapping[str, Sequence[Finding]]
    """Boxes by the image's name without suffix."""
    side_px: int | None = SIDE_PX
    """Side of the originals in whose px they are; None if they are in px of the images."""

    def on(self, stem: str, file: Path) -> tuple[Finding, ...]:
        """Return the boxes of an image, in px of its file as it is shown."""
        findings = tuple(self.findings.get(stem, ()))
        return fitted(findings, file) if findings and self.side_px else findings

    def notes(self, records: Sequence[Record]) -> Iterator[str]:
        """Yield notes for the user, one line each."""
        num_with = sum(bool(record.findings) for record in records)
        if self.table is not None and num_with != len(self.findings):
            yield (
                f"{self.table.name} has boxes on {len(self.findings)} images; {num_with} of them "
                "are here as squares like the NIH's, the boxes of the others are left out"
            )


def fitted(findings: tuple[Finding, ...], file: Path) -> tuple[Finding, ...]:
    """Convert boxes from px of an original of the NIH to px of a file.

    No box is left if the file is not a square, or cannot be read, which its decoder reports.
    """
    if look_at(file)[0] == "DICOM":  # RSNA's, which are as large as the originals
        return findings
    width, height = picture_size(file) or (0, -1)  # unreadable: two sides that differ
    if width != height:
        return ()
    ratio = width / SIDE_PX
    return tuple(scaled(found, ratio, ratio) for found in findings)


def read_boxes(folder: Path, labels: Sequence[str]) -> Boxes:
    """Read the table of boxes that lies in a folder of ChestX-ray14: the NIH's, or `OWN_TABLE`.

    Raises:
        CxrdistError: a row is not a box, is of another label, or leaves the original.
    """
    if (folder / TABLE).is_file():
        table = _nih_table(read_table(folder / TABLE, NIH_COLUMNS))
        return Boxes(table.file, _read(table, labels, SIDE_PX))
    if (folder / OWN_TABLE).is_file():
        table = read_table(folder / OWN_TABLE, COLUMNS)
        if {*COLUMNS} <= {*map(plain, table.columns)}:  # else it is one of burned-in text
            return Boxes(table.file, _read(table, labels, None), None)
    return Boxes(None, {})


def read_box_table(file: Path) -> Boxes:
    """Read a table of boxes of any labels: the NIH's, or one with `COLUMNS`.

    With `COLUMNS`, the images' names may have folders.

    Raises:
        CxrdistError: it has other columns, or a row is not a box or leaves the NIH's original.
    """
    table = read_table(file, {*COLUMNS, *NIH_COLUMNS})
    there = {*map(plain, table.columns)}
    if {*NIH_COLUMNS} <= there:
        return Boxes(file, _read(_nih_table(table), None, SIDE_PX))
    if lacking := [name for name in COLUMNS if name not in there]:
        raise CxrdistError(
            f"{file}: has no column {lacking[0]!r}, expected {', '.join(COLUMNS)}, in px of the "
            f"originals, or the NIH's {TABLE}; mend the header"
        )
    return Boxes(file, _read(table, None, None), None)


def _nih_table(table: Table) -> Table:
    """Replace the header of the NIH's table, whose later names are cut or empty, by `COLUMNS`.

    It is ``Image Index,Finding Label,Bbox [x,y,w,h],,,``.
    """
    if tuple(plain(name) for name in table.columns[:2]) != NIH_COLUMNS:
        raise CxrdistError(
            f"{table.file}: begins with the columns {', '.join(table.columns[:2])}, expected Image "
            "Index and Finding Label; fetch it again"
        )
    return replace(table, columns=COLUMNS)


def _read(
    table: Table, labels: Sequence[str] | None, side_px: int | None
) -> dict[str, list[Finding]]:
    """Read the boxes of each image by its name without suffix; of any label if None is given."""
    findings: dict[str, list[Finding]] = defaultdict(list)
    for where, row in table.cells(COLUMNS):
        label = SPELLINGS.get(row["label"], row["label"])
        if labels is not None and label not in labels:
            raise CxrdistError(f"{where}: {label!r:.40} is not one of the {len(labels)} labels")
        findings[without_suffix(row["image"])].append(finding_of(label, row, where, side_px))
    return dict(findings)


def finding_of(label: str, row: Mapping[str, str], where: str, side_px: int | None) -> Finding:
    """Read a box from a row with x, y, width and height in px.

    ``where`` names file and row in messages; ``side_px`` is that of the image, None if unknown.

    Raises:
        CxrdistError: it is not a box, or leaves the image.
    """
    x, y, width, height, *_ = box_of(row, where)
    most = (side_px or float("inf")) + ROUNDING_PX
    if x < 0 or y < 0 or x + width > most or y + height > most:
        raise CxrdistError(
            f"{where}: {width:g} x {height:g} px at {x:g}, {y:g} is not within the image of "
            f"{side_px or most:g} px; correct or remove the row"
        )
    return Finding(label, x, y, width, height)
