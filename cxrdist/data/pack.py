"""Pack: raw images -> WebDataset shards with an index and an audit."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from cxrdist.config import PackConfig, deciding
from cxrdist.data.anonymise import (
    Name,
    anonymise,
    make_private,
    names_file,
    private_age,
    read_key,
    read_salt,
    salt_of,
    shared_key,
    write_names,
)
from cxrdist.data.assemble import Item, assemble
from cxrdist.data.boxes import read_boxes
from cxrdist.data.depth import source_depth
from cxrdist.data.findings import LEAST_PX, MOST_FINDINGS, MOST_PX
from cxrdist.data.found import LeftOut
from cxrdist.data.index import MOST_CLASSES, MOST_INDEX_BYTES, MOST_SIDE_PX
from cxrdist.data.label_map import read_label_map
from cxrdist.data.masked import lungs_alone
from cxrdist.data.patients import MOST_YEARS
from cxrdist.data.records import NO_PATIENT, Record, Source
from cxrdist.data.sources import read_source
from cxrdist.data.splits import asked_splits, assign_splits, parse_split
from cxrdist.data.squares import (
    Part,
    Pngs,
    Square,
    locate_pngs,
    make_squares,
    plan_parts,
    read_part,
)
from cxrdist.data.views import LEFT_OUT, UNKNOWN, disagree, view_in_name
from cxrdist.errors import CxrdistError
from cxrdist.files import (
    locked,
    publish,
    read_document,
    read_json,
    remove,
    scratch_directory,
    write_json,
    write_table,
)
from cxrdist.terminal import progress

# Options that, with the input, decide the decoded squares; the others decide how they are packed.
DECODING = ("size", "fit", "cover", "anonymise")
PATHS = ("input", "label_map", "masks")  # options that name files of the source
MOST_NAMED = 20  # files in a message
Views = Mapping[str, tuple[str, ...]]  # views to pack, by the origin of a record


def pack(config: PackConfig) -> None:
    """Pack a source into a new directory of shards and print a summary.

    The bytes depend on the source, the options and the seed, not on the number of workers or tasks.
    Until the directory appears, the work is kept in a hidden one next to it. After a kill the same
    command resumes from there, even with other options, unless they change the decoded squares.

    Raises:
        CxrdistError: bad options or source, an unreadable image without ``skip_bad``, or a source
            that was changed since the pack was begun.
        RunFailedError: the disk is full.
    """
    _refuse_bad_options(config)
    work = config.out.with_name(f".{config.out.name}.partial")
    # Without training images one class is enough: its sensitivity can be measured.
    least_classes = 2 if parse_split(config.split)[0] else 1
    source = read_source(config, (config.out, work), least_classes)
    source = _with_options(source, config)
    decided = config.anonymise is not None or source.dicom
    if config.anonymise is None:
        config = replace(config, anonymise=source.dicom)
    content = _content(config, source, _known_salt(config, work))
    if _is_packed(config.out, work, content):
        return
    _refuse_large_index(config, source)
    _refuse_bad_findings(source)
    _refuse_bad_splits(config, source)
    with _held(work, shared=config.task is not None):
        key, names = shared_key(work), list[Name]()
        if config.anonymise:
            content = _content(config, source, salt_of(key))
            source, names = anonymise(source, key)
        _begin(work, _decoding(config, source))
        parts = plan_parts(source.records)
        if not config.merge:
            _decode(parts, work / "squares", config)
        if config.task is None:
            squares = _read_parts(parts, work, config, source.views)
            squares = _with_one_depth(parts, squares, work / "squares", config, source.views)
            with _on_this_machine(work) as here:
                items, pngs = _items(parts, squares, here, config)
                if not decided:
                    _refuse_late_dicom(items, work)
                rejected = [square for part in squares for square in part if square.reason]
                num_packed = assemble(config, source, items, pngs, here, rejected, content)
                if names:
                    write_names(names_file(config.out), key, names)
                publish(here / "shards", config.out)
            remove(work)
            print(f"packed {num_packed} images into {config.out}")
            if names:
                print(f"{names_file(config.out)}: the original of each name; keep it private")


def _refuse_bad_options(config: PackConfig) -> None:
    if (config.task is None) != (config.num_tasks is None):
        raise CxrdistError("--task and --num-tasks: give both, such as --task 0 --num-tasks 4")
    if config.task is not None and config.num_tasks is not None:
        if config.merge:
            raise CxrdistError("--merge: run it without --task, after all tasks are done")
        if config.task >= config.num_tasks:
            raise CxrdistError(f"--task {config.task}: expected 0 to {config.num_tasks - 1}")
    if not config.text_boxes and (config.cover, config.cover_split) != ("black", "all"):
        raise CxrdistError("--cover, --cover-split: need --text-boxes, see cxrdist find-text")
    parse_split(config.split)
    if not config.out.name:
        raise CxrdistError(f"--out {config.out}: expected the name of a directory to make")


def _with_options(source: Source, config: PackConfig) -> Source:
    """Add the boxes and masks to the records that --text-boxes and --lungs-only ask for."""
    if config.text_boxes:
        source = _with_boxes(source, config.text_boxes)
    return lungs_alone(source) if config.lungs_only else source


def _with_boxes(source: Source, file: Path) -> Source:
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


def _known_salt(config: PackConfig, work: Path) -> str | None:
    """Return the salt of an anonymised pack that was started or finished before.

    Raises:
        CxrdistError: a table of names of another pack would be overwritten.
    """
    if not config.anonymise:
        return None
    table = names_file(config.out)
    key, salt = read_key(work), read_salt(table)
    if salt is None:
        return None if key is None else salt_of(key)
    if salt != salt_of(key) if key is not None else not config.out.exists():
        raise CxrdistError(
            f"{table}: belongs to another pack and would be overwritten; move it next to the "
            "shards it belongs to"
        )
    return salt


def _content(config: PackConfig, source: Source, salt: str | None) -> dict[str, object]:
    """Return everything but the images that decides the bytes of the shards.

    An anonymised pack contains no names here, and the hash of the list of images has a salt.
    """
    options = deciding(config) | {name: _shown(config, getattr(config, name)) for name in PATHS}
    digest = hashlib.sha256((salt or "").encode())
    digest.update(repr((source.task, source.classes, sorted(source.views.items()))).encode())
    for record in source.records:
        names = (record.path, record.label, record.patient, record.source)
        facts = (str(record.split), record.view, record.sex, str(record.age))
        cells = (record.uncertain, record.missing, record.assumed_absent)
        digest.update("\0".join((*names, *facts, *cells, "\n")).encode())
        digest.update(repr([box[:4] for box in record.boxes]).encode() if record.boxes else b"")
        digest.update(repr(record.findings).encode() if record.findings else b"")
        digest.update(f"mask {record.mask[1:]}".encode() if record.mask else b"")
        digest.update(b"lungs only" if record.lungs_only else b"")
    return {**options, "records_sha256": digest.hexdigest()}


def _decoding(config: PackConfig, source: Source) -> dict[str, object]:
    """Return everything but the images that decides the decoded squares."""
    options = {name: getattr(config, name) for name in DECODING}
    digest = hashlib.sha256()
    for record in source.records:
        digest.update(f"{record.path}\0{[box[:4] for box in record.boxes]}\n".encode())
        digest.update(f"{record.mask.file} {record.mask[1:]}".encode() if record.mask else b"")
        digest.update(b"lungs only" if record.lungs_only else b"")
    shown = _shown(config, config.input)
    return {"input": shown, **options, "images_sha256": digest.hexdigest()}


def _shown(config: PackConfig, path: Path | None) -> str | None:
    """Return the path given to an option, empty for an anonymised pack."""
    return None if path is None else "" if config.anonymise else str(path)


def _refuse_large_index(config: PackConfig, source: Source) -> None:
    """Reject sizes and counts that readers of the index refuse (`cxrdist.data.index`)."""
    shards, most_shards = -(-len(source.records) // config.shard_size), MOST_INDEX_BYTES // 256
    for option, number, most, unit in (
        (f"--size {config.size}", config.size, MOST_SIDE_PX, "px"),
        (f"--input {config.input}", len(source.classes), MOST_CLASSES, "classes"),
        (f"--shard-size {config.shard_size}", shards, most_shards, "shards"),
    ):
        if number > most:
            raise CxrdistError(f"{option}: gives {number} {unit}, expected at most {most}")


def _refuse_bad_findings(source: Source) -> None:
    """Reject boxes that readers of the shards refuse (`cxrdist.data.findings`)."""
    for record in source.records:
        if len(record.findings) > MOST_FINDINGS:
            raise CxrdistError(
                f"{record.file}: has {len(record.findings)} boxes of findings, expected at most "
                f"{MOST_FINDINGS}"
            )
        for box in record.findings:
            edges = (box.x, box.y, box.width, box.height)
            inside = all(-MOST_PX <= edge <= MOST_PX for edge in edges)
            if not inside or min(box.width, box.height) < LEAST_PX:
                raise CxrdistError(
                    f"{record.file}: the box of {box.label} has {box.width:g} x {box.height:g} px "
                    f"at {box.x:g}, {box.y:g}; expected a box in px of the original"
                )


def _refuse_bad_splits(config: PackConfig, source: Source) -> None:
    """Check the options against the list of records, before any image is decoded.

    Patients in DICOM tags and copies are found later. They can only join groups that are separate
    here, so whatever is rejected here would also be rejected then.

    Raises:
        CxrdistError: the splits cannot be drawn, the one to be covered is empty, or the source
            lacks an expected class.
    """
    mapped = {} if config.label_map is None else read_label_map(config.label_map)
    for name in config.expect:
        if name not in source.classes and name not in mapped:
            raise CxrdistError(
                f"--expect.{name}: is not a class of {source.name}, which has "
                f"{', '.join(source.classes)}"
            )
    covered = config.cover_split
    if config.text_boxes and covered not in ("all", *asked_splits(source, config.split)):
        raise CxrdistError(
            f"--cover-split {covered}: this split has no images; choose another one, or change "
            "--split"
        )
    if config.duplicates == "drop":  # a patient's second image may be a copy that is dropped
        source = replace(source, records=[replace(r, patient=r.path) for r in source.records])
    assign_splits(source, config.split, config.seed)


def _is_packed(out: Path, work: Path, content: dict[str, object]) -> bool:
    """Return whether the same shards already exist; remove a work directory left by a kill.

    Raises:
        CxrdistError: something else exists there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    index, options = out / "index.json", out / "pack.json"
    if not index.is_file() and not isinstance(out, Path) and work.exists():
        return False  # an object store: killed while the shards were copied to it
    if not index.is_file() or not options.is_file() or read_json(options) != content:
        raise CxrdistError(f"--out {out}: already exists; remove it or choose another name")
    remove(work)
    print(f"{out}: is packed already")
    return True


def _held(work: Path, *, shared: bool) -> Any:
    """Lock the work directory; object stores have no locks.

    Raises:
        CxrdistError: the directory holds other files, and a pack would remove them in the end.
    """
    if not isinstance(work, Path):
        return nullcontext()
    others = [path.name for path in work.glob("[!.]*")]
    if work.is_symlink() or (others and "pack.json" not in others):
        raise CxrdistError(f"{work}: expected an unfinished pack, found other files; move it away")
    make_private(work)
    return locked(work, shared=shared)


def _begin(work: Path, decoding: dict[str, object]) -> None:
    """Start a pack, or check that an unfinished one has the same squares.

    Raises:
        CxrdistError: its squares were decoded from other images or with other options.
    """
    path = work / "pack.json"
    if not path.is_file():
        write_json(path, decoding)
        return
    before = read_document(path, dict[str, object], f"remove {work} to start over")
    for name, value in decoding.items():
        if before.get(name) != value:
            what = (
                "the list of images or of their text boxes or masks has changed since"
                if name == "images_sha256"
                else f"--{name.replace('_', '-')} was {before.get(name)}, is {value}"
            )
            raise CxrdistError(
                f"{work}: holds an unfinished pack with other options ({what}); use the earlier "
                "ones, or remove it to start over"
            )


def _decode(parts: list[Part], squares: Path, config: PackConfig) -> None:
    """Decode the parts of this task that do not exist yet."""
    mine = parts[config.task or 0 :: config.num_tasks or 1]
    missing = [part for part in mine if read_part(squares, part, redo_bad=True) is None]
    total = sum(len(part.records) for part in mine)
    done = total - sum(len(part.records) for part in missing)
    with progress(total, "decoding", "images", done=done) as bar:
        for count in _make(missing, squares, config, config.depth):
            bar.update(count)
    if config.task is not None:
        print(f"task {config.task} of {config.num_tasks}: {total} images are decoded")


def _make(parts: list[Part], squares: Path, config: PackConfig, depth: int | None) -> Iterator[int]:
    return make_squares(
        parts, squares, config.size, config.fit, config.workers, config.cover, depth
    )


@contextmanager
def _on_this_machine(work: Path) -> Iterator[Path]:
    """Yield the work directory, or a local copy of a remote one."""
    if isinstance(work, Path):
        yield work
        return
    with scratch_directory() as here:
        work.fs.get(f"{work.path}/squares", f"{here}/squares", recursive=True)
        yield here


def _read_parts(
    parts: list[Part], work: Path, config: PackConfig, views: Views
) -> list[list[Square]]:
    """Read the squares of each part; images of views that are not packed get that as reason.

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
    if rejected and not config.skip_bad:
        rows = [(square.path, square.reason) for square in rejected]
        write_table(work / "rejected.csv", LeftOut._fields, rows)
        bad = {square.path for square in rejected}
        files = [str(r.file) for part in parts for r in part.records if r.path in bad]
        listed = f"all in {work / 'rejected.csv'}"
        if config.anonymise:  # that table has no file names
            listed = ", ".join(files[:MOST_NAMED]) + (" ..." if len(files) > MOST_NAMED else "")
        more = f" ({len(rejected)} such images, {listed})"
        raise CxrdistError(
            f"{files[0]}: {rejected[0].reason}{more if len(rejected) > 1 else ''}; "
            "repair or remove it, or leave it out with --skip-bad; decoded images are kept"
        )
    return [
        [_with_reason(r, s, views) for r, s in zip(part.records, squares, strict=True)]
        for part, squares in zip(parts, made, strict=True)
    ]


def _with_reason(record: Record, square: Square, views: Views) -> Square:
    """Return the square, with a reason to leave it out if its view is not one to pack.

    A square with a reason does not count for the depth of the source either.
    """
    view = _view(record, square)
    if square.reason or view in views[record.origin]:
        return square
    return replace(square, reason=LEFT_OUT[view])


def _view(record: Record, square: Square) -> str:
    """Return the view by the table, else the tag, else the file's name, which is the original."""
    return record.view or square.view or view_in_name(record.file.name)


def _with_one_depth(
    parts: list[Part],
    squares: list[list[Square]],
    directory: Path,
    config: PackConfig,
    views: Views,
) -> list[list[Square]]:
    """Decode images again that were not scaled by the depth of the source.

    Which images these are depends on the source alone, so any number of workers, tasks and kills
    ends with the same bytes.
    """
    usable = [square for part in squares for square in part if not square.reason]
    depth = config.depth or source_depth(square.used_depth for square in usable)
    stale = [
        part
        for part, read in zip(parts, squares, strict=True)
        if not all(square.reason or square.is_scaled_by(depth) for square in read)
    ]
    if not stale:
        return squares
    total = sum(not square.is_scaled_by(depth) for square in usable)
    with progress(total, f"scaling by {depth} bits", "images") as bar:
        for count in _make(stale, directory, config, depth):
            bar.update(count)
    # Once more: an image that cannot be read now no longer counts for the depth.
    squares = _read_parts(parts, directory.parent, config, views)
    return _with_one_depth(parts, squares, directory, config, views)


def _items(
    parts: list[Part], by_part: list[list[Square]], work: Path, config: PackConfig
) -> tuple[list[Item], Pngs]:
    """Return the images that were read, and where their PNGs are."""
    squares = [square for part in by_part for square in part]
    records = [record for part in parts for record in part.records]
    known = _with_tags(config, records, squares)
    pairs = zip(known, squares, strict=True)
    items = [
        Item(r, square, i, 2 * len(records) + i)
        for i, (r, square) in enumerate(pairs)
        if not square.reason
    ]
    return items, locate_pngs(work / "squares", by_part)


def _refuse_late_dicom(items: list[Item], work: Path) -> None:
    """Reject DICOM files that were not recognised when --anonymise was chosen by default."""
    late = next((item.record.file for item in items if item.square.patient), None)
    if late is not None:
        raise CxrdistError(
            f"{late}: is a DICOM file with a patient, though not named as one; give --anonymise "
            f"true or --anonymise false, and remove {work} to start over"
        )


def _with_tags(
    config: PackConfig, records: Sequence[Record], squares: Sequence[Square]
) -> list[Record]:
    """Add patient, view, sex and age from DICOM tags.

    A patient becomes a number, since the tag identifies a person.
    """
    numbers: dict[tuple[str, str], int] = {}  # by source and patient
    known = []
    for record, square in zip(records, squares, strict=True):
        if square.patient and record.patient.startswith(NO_PATIENT):
            number = numbers.setdefault((record.origin, square.patient), len(numbers) + 1)
            record = replace(record, patient=f"dicom-{number:06d}")
        age = square.age if record.age is None else record.age
        if age is not None:
            age = None if math.isnan(age) else private_age(age) if config.anonymise else age
        view, sex = _view(record, square), record.sex or square.sex
        known.append(replace(record, view=view, sex=sex, age=age))
    ageless = sum(square.age is not None and math.isnan(square.age) for square in squares)
    if ageless:
        print(f"{ageless} DICOM ages are not 0 to {MOST_YEARS:g} years; they are left empty")
    _tell_views(records, squares)
    return known


def _tell_views(records: Sequence[Record], squares: Sequence[Square]) -> None:
    """Print how many tags name an unknown view, or another one than the table."""
    pairs = [(record.view, s.view) for record, s in zip(records, squares, strict=True)]
    unknown = sum(tag is None for _, tag in pairs)
    if unknown:
        print(f"{unknown} DICOM files have a view tag that cxrdist does not know")
    differing = sum(disagree(told, tag or UNKNOWN) for told, tag in pairs)
    if differing:
        print(
            f"{differing} images have different views in the table and in their tag; the table's "
            "is used"
        )
