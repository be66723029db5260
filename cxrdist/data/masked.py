"""Masked: match the images of a source with their masks."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cxrdist.data.found import (
    LeftOut,
    absolute,
    find_images,
    is_within,
    path_below,
    path_ends,
    without_suffix,
)
from cxrdist.data.index import Index
from cxrdist.data.labels import labels_of
from cxrdist.data.masks import MaskPlace
from cxrdist.data.records import Record, Source
from cxrdist.data.run_lengths import LEAST_QUALITY, list_runs
from cxrdist.errors import CxrdistError

MASKS, IMAGES = "masks", "images"


class _Named(NamedTuple):
    """A mask, and possible names of its image."""

    where: str
    """File or row, for messages."""
    names: tuple[str, ...]
    """Ends of the image's path, without the suffix; the first one that matches is used."""
    place: MaskPlace


def with_masks(source: Source, masks: Path) -> Source:
    """Assign masks, from a folder of pictures or a table of run lengths, to records of a source.

    A mask belongs to the image whose path ends with the mask's name, whatever the suffix. The name
    is the mask's path in its folder (a folder ``masks`` in it also matches ``images``), or the
    image's name in the table. Notes are added on masks that are not used.

    Raises:
        CxrdistError: there are no masks or none matches, a mask matches two images, or an image
            has two masks.
    """
    if masks.is_dir():
        named, notes = list(_pictures(source.records, masks)), list[str]()
    elif masks.is_file():
        named, notes = _rows(masks)
    else:
        raise CxrdistError(
            f"--masks {masks}: no such folder or table; expected masks under the images' names, or "
            "a table of run lengths"
        )
    matched, strays = _match(source.records, named)
    if not matched:
        example = without_suffix(source.records[0].path) if source.records else "an image"
        there = named[0].where if named else "nothing"
        raise CxrdistError(
            f"--masks {masks}: none of its {len(named)} masks is named like an image; expected "
            f"names like {example}.png, found {'; '.join([there, *notes])}"
        )
    records = [
        replace(record, mask=matched[i].place) if i in matched else record
        for i, record in enumerate(source.records)
    ]
    if strays:
        notes.append(
            f"{len(strays)} of {len(named)} masks match no image, the first is {strays[0].where}"
        )
    return replace(source, records=records, notes=(*source.notes, *notes))


def lungs_alone(source: Source) -> Source:
    """Leave out images without a mask, and mark the others to be packed with only the lungs.

    Raises:
        CxrdistError: no image, or no image of some class, has a mask.
    """
    kept = [replace(record, lungs_only=True) for record in source.records if record.mask]
    there = {label for record in kept for label in labels_of(record.label)}
    known = {label for record in source.records for label in labels_of(record.label)}
    if not kept:
        raise CxrdistError("--lungs-only: no image has a mask; give their masks with --masks")
    if lost := sorted(known - there):
        raise CxrdistError(
            f"--lungs-only: no image of {lost[0]} has a mask; give masks of all classes"
        )
    without = [LeftOut(r.path, "has no mask") for r in source.records if not r.mask]
    return replace(source, records=kept, left_out=tuple(sorted((*source.left_out, *without))))


def masks_of_samples(index: Index, masks: Path) -> tuple[dict[int, MaskPlace], tuple[str, ...]]:
    """Match masks with samples, as `with_masks` does with the images of a source.

    The masks by sample number are returned, and notes on masks that are not used.
    """
    # Paths start at the root, so that no folder above the source can match a name.
    records = [
        Record(Path("/") / sample.path, sample.path, sample.label, sample.patient, sample.source)
        for sample in index.samples
    ]
    matched = with_masks(Source(records, index.task, index.classes, str(masks)), masks)
    places = {i: record.mask for i, record in enumerate(matched.records) if record.mask is not None}
    return places, matched.notes


def folder_of_masks(masks: Path | None, source: Path) -> tuple[Path, ...]:
    """Return the folder of masks, which the search for images skips unless the source is in it."""
    return () if masks is None or not masks.is_dir() or is_within(source, masks) else (masks,)


def _pictures(records: Sequence[Record], folder: Path) -> Iterator[_Named]:
    """Yield the pictures of a folder; if it also holds the images, only those in masks folders."""
    # Absolute, since --input and --masks may name one folder differently, such as . and its path.
    images = {absolute(record.file) for record in records}
    files = find_images(folder).images
    holds_images = any(absolute(file) in images for file in files)
    for file in files:
        path = path_below(folder, file)
        *folders, last = path.split("/")
        if absolute(file) in images or (holds_images and MASKS not in folders):
            continue
        renamed = [IMAGES if name == MASKS else name for name in folders]
        names = (without_suffix(path), without_suffix("/".join([*renamed, last])))
        yield _Named(path, names, MaskPlace(file))


def _rows(table: Path) -> tuple[list[_Named], list[str]]:
    """Return the rows of a table of run lengths with sufficient quality, and notes on others."""
    rows = list(list_runs(table))
    named = [
        _Named(
            f"{row.where} ({row.name})",
            (without_suffix(row.name),),
            MaskPlace(table, row.first_byte, row.num_bytes),
        )
        for row in rows
        # Not >=, so that a mask whose quality is not known (NaN) is used.
        if not row.quality < LEAST_QUALITY
    ]
    poor = len(rows) - len(named)
    unknown = sum(row.quality != row.quality for row in rows)  # only NaN differs from itself
    notes = [f"{poor} masks have a Dice RCA below {LEAST_QUALITY} and are left out"] * bool(poor)
    notes += [f"{unknown} masks have no Dice RCA and are used as they are"] * bool(unknown)
    return named, notes


def _match(
    records: Sequence[Record], named: Sequence[_Named]
) -> tuple[dict[int, _Named], list[_Named]]:
    """Return the masks by position of their record, and the masks without a record."""
    paths = (absolute(record.file) for record in records)
    # The other names have as many folders as the first, so their ends are indexed too.
    ends = path_ends(paths, (mask.names[0] for mask in named))
    matched: dict[int, _Named] = {}
    strays = []
    for mask in named:
        positions = next((ends[name] for name in mask.names if name in ends), [])
        if len(positions) > 1:
            one, other = (records[i].path for i in positions[:2])
            raise CxrdistError(
                f"--masks: {mask.where} matches both {one} and {other}; put the masks into folders "
                "named like those of the images"
            )
        if not positions:
            strays.append(mask)
            continue
        before = matched.setdefault(positions[0], mask)
        if before is not mask:
            raise CxrdistError(
                f"--masks: {before.where} and {mask.where} both match "
                f"{records[positions[0]].path}; remove one"
            )
    return matched, strays
