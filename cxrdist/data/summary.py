"""Summary: the description of packed shards in index.json, in audit.json and on the screen."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from cxrdist.data.assemble import Assembled, Layout, findings_in_square
from cxrdist.data.audit import Entry, audit, summary
from cxrdist.data.audit_file import AuditFile
from cxrdist.data.depth import describe_depth
from cxrdist.data.images import decode_png
from cxrdist.data.index import Index, IndexFile, describe_splits, read_index
from cxrdist.data.labels import NOT_STATED
from cxrdist.data.masks import describe_masks, masks_line
from cxrdist.data.records import SPLITS, Record, Source, count_unmatched, differences
from cxrdist.data.sources import ONLY_FOR
from cxrdist.data.splits import describe_split, split_notes
from cxrdist.data.squares import Square
from cxrdist.data.views import LEFT_OUT, NAMES
from cxrdist.errors import RunFailedError
from cxrdist.files import sha256_of, write_json
from cxrdist.info import LabelAmount
from cxrdist.terminal import counted, few, table

Counts = dict[str, dict[str, LabelAmount]]  # by split and class
MOST_SOURCES = 10  # in a line
_PATIENT_HINT = " (give patients with --patient-pattern or a csv column `patient`)"


def describe(
    source: Source,
    shards: Assembled,
    work: Path,
    layout: Layout,
    expect: Mapping[str, int],
    kind: str,
) -> None:
    """Write audit.json and index.json into ``work/shards``, and print a summary.

    ``work`` is the directory of the unfinished pack, ``expect`` the expected images per class, and
    ``kind`` the source's, as in --source.

    Raises:
        RunFailedError: a file was lost.
    """
    directory = work / "shards"
    fates = _count_fates(source, shards)
    audit_file = _audit(shards, work / "squares")
    write_json(directory / "audit.json", audit_file)
    described = index_file(shards, directory / "samples.csv", layout)
    # Last, since a directory with an index is complete.
    write_json(directory / "index.json", described)
    # Read back, so that shards which no reader would take are never published.
    index, splits = read_index(directory), [sample.split for sample in shards.samples]
    _print_counts(index)
    for lines in (
        _tell_origins(index),
        _tell_patients(shards.source.records, kind),
        _tell_cover(index),
        (f"{source.name}: {line}" for line in source.notes),
        (
            f"unexpected count in {source.name}: {line}"
            for line in differences(_of_views(source, shards.rejected), expect)
        ),
        _tell_squares(shards.squares, described, layout),
        (
            f"splits: {line}"
            for line in split_notes(shards.source, layout.split, shards.groups, splits)
        ),
        (summary(audit_file), table(fates, ("files", ""))),
    ):
        for line in lines:
            print(line)


def _audit(shards: Assembled, parts: Path) -> AuditFile:
    """Audit the squares, in the order of the records."""
    squares = shards.squares
    entries = [
        Entry(row, s.width_px, s.height_px, s.fingerprint, s.mask_share if s.mask_sha256 else None)
        for row, s in zip(shards.samples, squares, strict=True)
    ]
    return audit(
        entries,
        shards.duplicates,
        lambda number: decode_png(squares[number].png(parts)),
        shards.source.classes,
        shards.source.task,
        thumbnails=lambda number: squares[number].thumbnail(parts),
    )


def index_file(shards: Assembled, samples: Path, layout: Layout) -> IndexFile:
    """Return the content of index.json."""
    source, squares = shards.source, shards.squares
    index: IndexFile = {
        "format": "cxrdist-shards-1",
        "task": source.task,
        "classes": source.classes,
        "image_size_px": layout.size_px,
        "fit": layout.fit,
        "split": describe_split(source, layout.split),
        "seed": layout.seed,
        "samples_sha256": sha256_of(samples),
        "splits": describe_splits(source.classes, shards.samples, shards.entries),
        "depth": next((square.depth for square in squares if square.depth), None),
    }
    if masks := describe_masks([square.mask_share for square in squares if square.mask_sha256]):
        index["masks"] = masks
    if any(record.lungs_only for record in source.records):
        index["lungs_only"] = True
    if layout.cover:
        covered = [square for square in squares if square.covered]
        index["cover"] = {
            "how": layout.cover,
            "split": layout.cover_split,
            "images": len(covered),
            "boxes": sum(len(square.record.boxes) for square in covered),
        }
    return index


def _print_counts(index: Index) -> None:
    """Print how many images and patients were packed per class, and the labels of each kind."""
    counts = index.counts()
    print(table(_class_by_split(index, counts), ("class", *SPLITS, "all", "patients")))
    print(f"images of {len({s.patient for s in index.samples})} patients, none in two splits")
    _print_labels(index, counts)


def _class_by_split(index: Index, counts: Counts) -> list[list[str]]:
    """Return the rows of the class x split table: images, then the patients of the class."""
    rows = []
    for name in index.classes:
        images = [counts[split][name]["images"] for split in SPLITS]
        patients = sum(counts[split][name]["patients"] for split in SPLITS)
        rows.append([name, *map(str, images), str(sum(images)), str(patients)])
    totals = [*(total["images"] for total in index.totals().values()), len(index.samples)]
    return [*rows, ["all", *map(str, totals), str(len({s.patient for s in index.samples}))]]


def _print_labels(index: Index, counts: Counts) -> None:
    """Print the counts of present, absent and unknown labels, if any are unknown."""
    rows, num_not_stated = [], 0
    for label in index.classes:
        amounts = [counts[split][label] for split in SPLITS]
        present = sum(amount["images"] for amount in amounts)
        others = [sum(amount.get(what, 0) for amount in amounts) for what in NOT_STATED]
        absent = len(index.samples) - present - sum(others)
        rows.append([label, *map(str, (present, absent, *others))])
        num_not_stated += sum(others)
    if num_not_stated:
        print(table(rows, ("label", "present", "absent", "uncertain", "missing", "assumed absent")))


def _tell_origins(index: Index) -> Iterator[str]:
    """Yield a line on the views, and one on the sources if there are several."""
    views = Counter(sample.view for sample in index.samples)
    yield f"views: {', '.join(f'{n} {NAMES[view]}' for view, n in views.most_common())}"
    sources = Counter(sample.source for sample in index.samples)
    if len(sources) > 1:
        listed = [f"{number} {name}" for name, number in sources.most_common()]
        yield f"sources: {few(listed, MOST_SOURCES)}"


def _tell_patients(records: list[Record], kind: str) -> Iterator[str]:
    """Yield a line on images without a known patient, if there are any."""
    if unmatched := count_unmatched(records):
        yield (
            f"{unmatched} of {len(records)} images have no known patient; each counts as a patient "
            f"of its own{_PATIENT_HINT if kind in ONLY_FOR['patient_pattern'] else ''}"
        )


def _tell_cover(index: Index) -> Iterator[str]:
    """Yield a line on covered text, if any was to be covered."""
    if cover := index.cover:
        yield (
            f"burned-in text: {counted(cover['boxes'], 'box', 'es')} in "
            f"{counted(cover['images'], 'image')} covered ({cover['how']}, {cover['split']})"
        )


def _tell_squares(squares: list[Square], index: IndexFile, layout: Layout) -> Iterator[str]:
    """Yield lines on depths, masks and boxes, if there are any."""
    if depth := index.get("depth"):
        yield describe_depth(depth, [square.used_depth for square in squares])
    if masks := index.get("masks"):
        yield masks_line(masks, len(squares))
    with_boxes = [square for square in squares if square.record.findings]
    num_boxes = sum(len(square.record.findings) for square in with_boxes)
    lost = num_boxes - sum(len(findings_in_square(square, layout)) for square in with_boxes)
    if num_boxes:
        outside = f"; left out, outside of the square: {lost}" if lost else ""
        boxes, images = counted(num_boxes, "box", "es"), counted(len(with_boxes), "image")
        yield f"findings: {boxes} in {images}{outside}"


def _of_views(source: Source, rejected: list[Square]) -> Source:
    """Return the source without the images whose views are not packed, for the counts."""
    others = {square.record.path for square in rejected if square.reason in LEFT_OUT.values()}
    return replace(source, records=[r for r in source.records if r.path not in others])


def _count_fates(source: Source, shards: Assembled) -> list[tuple[str, str]]:
    """Return the rows of the table that accounts for all files, most frequent reasons first."""
    reasons = Counter(left.reason for left in source.left_out)
    views = LEFT_OUT.values()
    late = (square.reason for square in shards.rejected)
    reasons += Counter(reason if reason in views else "unreadable" for reason in late)
    # Adding drops counts of 0, so that without copies there is no row for them.
    reasons += Counter({"copy, in dropped.csv": shards.num_copies})
    num_packed = len(shards.squares)
    if source.num_found != num_packed + reasons.total():
        raise RunFailedError(
            f"{source.num_found} files were found, but {num_packed} are packed and "
            f"{reasons.total()} left out; this is a bug in cxrdist, please report it"
        )
    left_out = [(f"left out: {reason}", str(number)) for reason, number in reasons.most_common()]
    return [("found", str(source.num_found)), ("packed", str(num_packed)), *left_out]
