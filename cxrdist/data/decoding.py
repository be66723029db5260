"""Decoding: the records of a pack -> squares of one bit depth, with the values of DICOM tags."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cxrdist.data.anonymise import private_age
from cxrdist.data.depth import source_depth
from cxrdist.data.found import LeftOut
from cxrdist.data.patients import MOST_YEARS
from cxrdist.data.records import NO_PATIENT
from cxrdist.data.squares import Part, Square, read_part
from cxrdist.data.views import LEFT_OUT, UNKNOWN, disagree, view_in_name
from cxrdist.errors import CxrdistError
from cxrdist.files import write_table
from cxrdist.terminal import few, progress

MOST_NAMED = 20  # files in a message
Views = Mapping[str, tuple[str, ...]]  # views to pack, by the origin of a record
# `make_squares` of parts by a depth, for the other options of a pack.
Make = Callable[[Sequence[Part], int | None], Iterator[int]]


def decode_missing(parts: Sequence[Part], directory: Path, make: Make, depth: int | None) -> int:
    """Decode the parts that do not exist yet; return the number of images in all of them."""
    missing = [part for part in parts if read_part(directory, part, redo_bad=True) is None]
    total = sum(len(part.records) for part in parts)
    done = total - sum(len(part.records) for part in missing)
    with progress(total, "decoding", "images", done=done) as bar:
        for count in make(missing, depth):
            bar.update(count)
    return total


def scaled_by_one_depth(
    parts: Sequence[Part], read: Callable[[], list[Square]], make: Make, depth: int | None
) -> list[Square]:
    """Read all squares, and decode those again that were not scaled by the depth of the source.

    ``read`` reads the squares of all parts; a given depth is that of --depth. Which images these
    are depends on the source alone, so any number of workers, tasks and kills ends with the same
    bytes.
    """
    # Repeated: an image that has become unreadable meanwhile no longer counts for the depth.
    while True:
        squares = read()
        usable = [square for square in squares if not square.reason]
        white = depth or source_depth(square.used_depth for square in usable)
        stale = {square.part for square in usable if not square.is_scaled_by(white)}
        if not stale:
            return squares
        total = sum(not square.is_scaled_by(white) for square in usable)
        with progress(total, f"scaling by {white} bits", "images") as bar:
            again = [part for part in parts if part.number in stale]
            for count in make(again, white):
                bar.update(count)


def read_squares(
    parts: Sequence[Part], work: Path, views: Views, *, skip_bad: bool, named: bool
) -> list[Square]:
    """Read the squares of all parts; one whose view is not packed gets a reason to be left out.

    ``work`` is the directory of the unfinished pack. Records that are not ``named`` like their
    files have pseudonyms: then rejected.csv helps nobody, and the message lists the files.

    Raises:
        CxrdistError: images are not decoded yet, or cannot be read and ``skip_bad`` is not set.
    """
    read = [read_part(work / "squares", part, redo_bad=False) for part in parts]
    made = [squares for squares in read if squares is not None]
    total, decoded = sum(len(part.records) for part in parts), sum(map(len, made))
    if decoded < total:
        raise CxrdistError(
            f"{work}: {total - decoded} of {total} images are not decoded yet; run all tasks "
            "before --merge"
        )
    rejected = [square for squares in made for square in squares if square.reason]
    if rejected and not skip_bad:
        rows = [(square.record.path, square.reason) for square in rejected]
        write_table(work / "rejected.csv", LeftOut._fields, rows)
        files = [str(square.record.file) for square in rejected]
        listed = f"all in {work / 'rejected.csv'}" if named else few(files, MOST_NAMED)
        more = f" ({len(rejected)} such images, {listed})" if len(rejected) > 1 else ""
        raise CxrdistError(
            f"{files[0]}: {rejected[0].reason}{more}; repair or remove it, or leave it out with "
            "--skip-bad; decoded images are kept"
        )
    return [_with_reason(square, views) for squares in made for square in squares]


def _with_reason(square: Square, views: Views) -> Square:
    """Return the square, with a reason to leave it out if its view is not one to pack.

    A square with a reason does not count for the depth of the source either.
    """
    view = _view(square)
    if square.reason or view in views[square.record.origin]:
        return square
    return replace(square, reason=LEFT_OUT[view])


def _view(square: Square) -> str:
    """Return the view by the table, else the tag, else the file's name, never its pseudonym."""
    return square.record.view or square.view or view_in_name(square.record.file.name)


def refuse_late_dicom(squares: list[Square], work: Path) -> None:
    """Reject DICOM files with a patient that have the suffix of another format.

    Only decoding reveals them, and the default of --anonymise was chosen before that.
    """
    late = next((s.record.file for s in squares if s.patient and not s.reason), None)
    if late is not None:
        raise CxrdistError(
            f"{late}: is a DICOM file with a patient, though not named as one; give --anonymise "
            f"true or --anonymise false, and remove {work} to start over"
        )


def with_tags(squares: Sequence[Square], *, private: bool) -> list[Square]:
    """Add patient, view, sex and age from DICOM tags to the records, and print unusable tags.

    A patient becomes a number, since the tag identifies a person. In a ``private`` pack high ages
    are cut.
    """
    # By source and patient: the same ID in two sources is two people. Squares are in the order of
    # their paths: as these are pseudonyms in an anonymised pack, the numbers reveal nothing.
    numbers: dict[tuple[str, str], int] = {}
    known = []
    for square in squares:
        record = square.record
        if square.patient and record.patient.startswith(NO_PATIENT):
            number = numbers.setdefault((record.origin, square.patient), len(numbers) + 1)
            record = replace(record, patient=f"dicom-{number:06d}")
        age = square.age if record.age is None else record.age
        if age is not None:
            age = None if math.isnan(age) else private_age(age) if private else age
        record = replace(record, view=_view(square), sex=record.sex or square.sex, age=age)
        known.append(replace(square, record=record))
    ageless = sum(square.age is not None and math.isnan(square.age) for square in squares)
    if ageless:
        print(f"{ageless} DICOM ages are not 0 to {MOST_YEARS:g} years; they are left empty")
    _tell_views(squares)
    return known


def _tell_views(squares: Sequence[Square]) -> None:
    """Print how many tags name an unknown view, and how many contradict the table."""
    unknown = sum(square.view is None for square in squares)
    if unknown:
        print(f"{unknown} DICOM files have a view tag that cxrdist does not know")
    differing = sum(disagree(s.record.view, s.view or UNKNOWN) for s in squares)
    if differing:
        print(
            f"{differing} images have different views in the table and in their tag; the table's "
            "is used"
        )
