"""The plan of a pack: what decides its bytes, and what is refused before an image is opened."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cxrdist.data.anonymise import names_file, read_key, read_salt, salt_of
from cxrdist.data.boxes import read_boxes
from cxrdist.data.findings import LEAST_PX, MOST_FINDINGS, MOST_PX
from cxrdist.data.index import (
    MOST_CLASSES,
    MOST_INDEX_BYTES,
    MOST_LINE_CHARACTERS,
    MOST_NAME,
    MOST_SIDE_PX,
)
from cxrdist.data.label_map import read_label_map
from cxrdist.data.records import Record, Source
from cxrdist.data.splits import asked_splits, assign_splits
from cxrdist.errors import CxrdistError

PATHS = ("input", "label_map", "masks")  # options that name files of the source
Options = Mapping[str, object]  # that decide the result, by field


def refuse_bad_tasks(task: int | None, num_tasks: int | None, *, merge: bool) -> None:
    """Check that the options of an array of tasks belong together."""
    if merge and (task, num_tasks) != (None, None):
        raise CxrdistError("--merge: run it without --task and --num-tasks, after all tasks")
    if (task is None) != (num_tasks is None):
        raise CxrdistError("--task and --num-tasks: give both, such as --task 0 --num-tasks 4")
    if task is not None and num_tasks is not None and task >= num_tasks:
        raise CxrdistError(f"--task {task}: expected 0 to {num_tasks - 1}")


def with_boxes(source: Source, file: Path) -> Source:
    """Give each record its boxes of burned-in text; the table may list left-out images too."""
    boxes = read_boxes(file)
    records = [replace(r, boxes=boxes.get(r.path, ())) for r in source.records]
    known = {record.path for record in records} | {left.path for left in source.left_out}
    strangers = sorted(boxes.keys() - known)
    if strangers:
        print(
            f"{file}: {len(strangers)} of its {len(boxes)} images are not in the source, the "
            f"first is {strangers[0]}"
        )
    if boxes and len(strangers) == len(boxes):
        raise CxrdistError(
            f"--text-boxes {file}: has no image of the source; make it with cxrdist find-text "
            "and the same --source and --input"
        )
    return replace(source, records=records)


def known_salt(out: Path, work: Path) -> str | None:
    """Return the salt of an anonymised pack that was started or finished before.

    Raises:
        CxrdistError: a table of names of another pack would be overwritten.
    """
    table = names_file(out)
    key, salt = read_key(work), read_salt(table)
    if salt is None:
        return None if key is None else salt_of(key)
    # An unfinished pack is known by its key. A finished one has none, but its shards exist.
    if salt != salt_of(key) if key is not None else not out.exists():
        raise CxrdistError(
            f"{table}: belongs to another pack and would be overwritten; move it next to the "
            "shards it belongs to"
        )
    return salt


def content_of(options: Options, source: Source, salt: str | None) -> dict[str, object]:
    """Return everything but the images that decides the bytes of the shards.

    An anonymised pack contains no names here, and the hash of the list of images has a salt.
    """
    content = {**options, **{name: _shown(options, name) for name in PATHS}}
    digest = hashlib.sha256((salt or "").encode())
    if salt:  # equal names in another folder are other images
        digest.update(repr([str(options[name]) for name in PATHS]).encode())
    digest.update(repr((source.task, source.classes, sorted(source.views.items()))).encode())
    for record in source.records:
        names = (record.path, record.label, record.patient, record.source)
        facts = (str(record.split), record.view, record.sex, str(record.age))
        cells = (record.uncertain, record.missing, record.assumed_absent)
        digest.update("\0".join((*names, *facts, *cells, "\n")).encode())
        # Without text and score, which change no pixel.
        digest.update(repr([box[:4] for box in record.boxes]).encode() if record.boxes else b"")
        digest.update(repr(record.findings).encode() if record.findings else b"")
        digest.update(f"mask {record.mask[1:]}".encode() if record.mask else b"")
        digest.update(b"lungs only" if record.lungs_only else b"")
    return {**content, "records_sha256": digest.hexdigest()}


def decoding_of(options: Options, source: Source) -> dict[str, object]:
    """Return everything but the pixels of the originals that decides the decoded squares."""
    digest = hashlib.sha256()
    for record in source.records:
        digest.update(f"{record.path}\0{[box[:4] for box in record.boxes]}\n".encode())
        digest.update(f"{record.mask.file} {record.mask[1:]}".encode() if record.mask else b"")
        digest.update(b"lungs only" if record.lungs_only else b"")
    return {**options, "input": _shown(options, "input"), "images_sha256": digest.hexdigest()}


def _shown(options: Options, name: str) -> str | None:
    """Return the path given to an option, empty for an anonymised pack."""
    path = options[name]
    return None if path is None else "" if options["anonymise"] else str(path)


def refuse_large_index(source: Source, given: Path, size_px: int, shard_size: int) -> None:
    """Reject sizes and counts that readers of the index refuse (`cxrdist.data.index`)."""
    # An entry of index.json has 200 bytes. In a line of samples.csv half is left for doubled quotes
    # and for what `_num_characters` leaves out.
    shards, most_shards = -(-len(source.records) // shard_size), MOST_INDEX_BYTES // 256
    longest, most_characters = max(map(_num_characters, source.records)), MOST_LINE_CHARACTERS // 2
    for option, number, most, unit in (
        (f"--size {size_px}", size_px, MOST_SIDE_PX, "px"),
        (f"--input {given}", len(source.classes), MOST_CLASSES, "classes"),
        (f"--input {given}", max(map(len, source.classes)), MOST_NAME, "characters of a class"),
        (f"--input {given}", longest, most_characters, "characters about an image"),
        (f"--shard-size {shard_size}", shards, most_shards, "shards"),
    ):
        if number > most:
            raise CxrdistError(f"{option}: gives {number} {unit}, expected at most {most}")


def _num_characters(record: Record) -> int:
    """Count the characters in the row of an image, but for quotes, hashes and short cells."""
    labels = record.label, record.uncertain, record.missing, record.assumed_absent
    return sum(map(len, (record.path, record.patient, record.source, *labels)))


def refuse_bad_findings(source: Source) -> None:
    """Reject boxes that readers of the shards refuse (`cxrdist.data.findings`)."""
    for record in source.records:
        if len(record.findings) > MOST_FINDINGS:
            raise CxrdistError(
                f"{record.file}: has {len(record.findings)} boxes of findings, expected at most "
                f"{MOST_FINDINGS}"
            )
        for box in record.findings:
            edges = (box.x, box.y, box.width, box.height)
            inside = all(-MOST_PX <= edge <= MOST_PX for edge in edges)  # false for NaN too
            if not inside or min(box.width, box.height) < LEAST_PX:
                raise CxrdistError(
                    f"{record.file}: the box of {box.label} has {box.width:g} x {box.height:g} px "
                    f"at {box.x:g}, {box.y:g}; expected a box in px of the original"
                )


def refuse_unknown_classes(
    source: Source, expect: Mapping[str, int], label_map: Path | None
) -> None:
    """Check that the source has the expected classes, or that the label map removes them."""
    mapped = {} if label_map is None else read_label_map(label_map)
    for name in expect:
        if name not in source.classes and name not in mapped:
            raise CxrdistError(
                f"--expect.{name}: is not a class of {source.name}, which has "
                f"{', '.join(source.classes)}"
            )


def refuse_empty_cover(source: Source, split: str | None, covered: str) -> None:
    """Check that the split whose text is to be covered has images."""
    if covered not in ("all", *asked_splits(source, split)):
        raise CxrdistError(
            f"--cover-split {covered}: this split has no images; choose another one, or change "
            "--split"
        )


def refuse_bad_splits(source: Source, split: str | None, seed: int, *, drops_copies: bool) -> None:
    """Check that the splits can be drawn, before any image is decoded.

    Patients in DICOM tags and copies are found later. They can only join groups that are separate
    here, so whatever is rejected here would also be rejected then.
    """
    if drops_copies:  # a patient's second image may be a copy that is dropped
        source = replace(source, records=[replace(r, patient=r.path) for r in source.records])
    assign_splits(source, split, seed)
