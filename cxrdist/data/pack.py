"""Pack: raw images -> WebDataset shards with an index and an audit."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cxrdist.config import PackConfig
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
from cxrdist.run import (
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

# Options that decide the decoded squares, beside the input; the others only how they are packed.
DECODING = ("size", "fit", "cover", "anonymise")
PATHS = ("input", "label_map", "masks")  # options that name files of the source
MOST_NAMED = 20  # files in a message
# What may differ between two calls that make the same shards.
NOT_CONTENT = (
    *("out", "workers", "skip_bad", "task", "num_tasks", "merge", "expect"),
    *("text_boxes", "lungs_only"),  # which the hash of the records tells
)
Views = Mapping[str, tuple[str, ...]]  # that are packed, by the origin of a record


def pack(config: PackConfig) -> None:
    """Pack a source into a new directory of shards and print what is in it.

    The bytes depend on the source, the options and the seed, not on the number of workers or tasks.
    Until the directory appears, what is done is in a hidden one beside it; after a kill the same
    command resumes with it, and so does one with other options that do not decide the squares.

    Raises:
        CxrdistError: bad options or source, an unreadable image without ``skip_bad``, or a source
            that was changed since the pack was begun.
        RunFailedError: the disk is full.
    """
    _refuse_bad_options(config)
    work = config.out.with_name(f".{config.out.name}.partial")
    least_classes = 2 if parse_split(config.split)[0] else 1  # one tells a sensitivity
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
            found = _read_parts(parts, work, config, source.views)
            found = _with_one_depth(parts, found, work / "squares", config, source.views)
            with _on_this_machine(work) as here:
                items, pngs = _items(parts, found, here, config)
                if not decided:
                    _refuse_late_dicom(items, work)
                rejected = [square for part in found for square in part if square.reason]
                num_packed = assemble(config, source, items, pngs, here, rejected, content)
                if names:
                    write_names(names_file(config.out), key, names)
                publish(here / "shards", config.out)
            remove(work)
            print(f"packed {num_packed} images into {config.out}")
            if names:
                print(f"{names_file(config.out)}: what each name stands for; keep it to yourself")


def _refuse_bad_options(config: PackConfig) -> None:
    if (config.task is None) != (config.num_tasks is None):
        raise CxrdistError("--task and --num-tasks: go together, such as --task 0 --num-tasks 4")
    if config.task is not None and config.num_tasks is not None:
        if config.merge:
            raise CxrdistError("--merge: comes after the tasks, without --task")
        if config.task >= config.num_tasks:
            raise CxrdistError(f"--task {config.task}: expected 0 to {config.num_tasks - 1}")
    if not config.text_boxes and (config.cover, config.cover_split) != ("black", "all"):
        raise CxrdistError("--cover, --cover-split: need --text-boxes, see cxrdist find-text")
    parse_split(config.split)
    if not config.out.name:
        raise CxrdistError(f"--out {config.out}: expected the name of a directory to make")


def _with_options(source: Source, config: PackConfig) -> Source:
    """Note on the records what is to be covered or made black in their images."""
    if config.text_boxes:
        source = _with_boxes(source, config.text_boxes)
    return lungs_alone(source) if config.lungs_only else source


def _with_boxes(source: Source, file: Path) -> Source:
    """Give each record its boxes of burned-in text; images that are left out may have some too."""
    boxes = read_boxes(file)
    records = [replace(r, boxes=boxes.get(r.path, ())) for r in source.records]
    known = {record.path for record in records} | {left.path for left in source.left_out}
    strangers = sorted(boxes.keys() - known)
    if strangers:
        print(
            f"{file}: {len(strangers)} of its {len(boxes)} images are none of the source, the "
            f"first is {strangers[0]}"
        )
    if boxes and len(strangers) == len(boxes):
        raise CxrdistError(
            f"--text-boxes {file}: has no image of the source; make it with cxrdist find-text of "
            "the same --source and --input"
        )
    return replace(source, records=records)


def _known_salt(config: PackConfig, work: Path) -> str | None:
    """Return the salt of an anonymised pack that was begun or finished before.

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
            f"{table}: is the table of names of another pack; move it to where its shards are"
        )
    return salt


def _content(config: PackConfig, source: Source, salt: str | None) -> dict[str, object]:
    """Return all that decides the bytes of the shards but the images themselves.

    Where names are to tell nothing, none is in it, and the hash of the list has a salt.
    """
    options: dict[str, object] = asdict(config)
    options = {name: value for name, value in options.items() if name not in NOT_CONTENT}
    options |= {name: _shown(config, getattr(config, name)) for name in PATHS}
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
    """Return all that decides the decoded squares but the images themselves."""
    options = {name: getattr(config, name) for name in DECODING}
    digest = hashlib.sha256()
    for record in source.records:
        digest.update(f"{record.path}\0{[box[:4] for box in record.boxes]}\n".encode())
        digest.update(f"{record.mask.file} {record.mask[1:]}".encode() if record.mask else b"")
        digest.update(b"lungs only" if record.lungs_only else b"")
    shown = _shown(config, config.input)
    return {"input": shown, **options, "images_sha256": digest.hexdigest()}


def _shown(config: PackConfig, path: Path | None) -> str | None:
    """Return the path of an option, empty where names are to tell nothing."""
    return None if path is None else "" if config.anonymise else str(path)


def _refuse_large_index(config: PackConfig, source: Source) -> None:
    """Refuse what no reader of the index would take (`cxrdist.data.index`)."""
    shards, most_shards = -(-len(source.records) // config.shard_size), MOST_INDEX_BYTES // 256
    for option, number, most, unit in (
        (f"--size {config.size}", config.size, MOST_SIDE_PX, "px"),
        (f"--input {config.input}", len(source.classes), MOST_CLASSES, "classes"),
        (f"--shard-size {config.shard_size}", shards, most_shards, "shards"),
    ):
        if number > most:
            raise CxrdistError(f"{option}: makes {number} {unit}, expected at most {most}")


def _refuse_bad_findings(source: Source) -> None:
    """Refuse boxes that no reader of the shards would take (`cxrdist.data.findings`)."""
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
    """Judge the options by the list of records, before any image is decoded.

    Patients in DICOM tags and copies are found later and can only join what is apart here, so
    what is refused here would be refused then.

    Raises:
        CxrdistError: the splits cannot be drawn, the one to be covered is empty, or a class is
            expected that the source lacks.
    """
    mapped = {} if config.label_map is None else read_label_map(config.label_map)
    for name in config.expect:
        if name not in source.classes and name not in mapped:
            raise CxrdistError(
                f"--expect.{name}: is no class of {source.name}, which has "
                f"{', '.join(source.classes)}"
            )
    covered = config.cover_split
    if config.text_boxes and covered not in ("all", *asked_splits(source, config.split)):
        raise CxrdistError(f"--cover-split {covered}: has no images by --split and the source")
    if config.duplicates == "drop":  # a patient's second image may be a copy that is dropped
        source = replace(source, records=[replace(r, patient=r.path) for r in source.records])
    assign_splits(source, config.split, config.seed)


def _is_packed(out: Path, work: Path, content: dict[str, object]) -> bool:
    """Return whether the shards stand already; a kill may have left the work directory.

    Raises:
        CxrdistError: something else stands there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    index, options = out / "index.json", out / "pack.json"
    if not index.is_file() and not isinstance(out, Path) and work.exists():
        return False  # an object store: killed while the shards were copied to their place
    if not index.is_file() or not options.is_file() or read_json(options) != content:
        raise CxrdistError(f"--out {out}: stands already; remove it or choose another name")
    remove(work)
    print(f"{out}: is packed already")
    return True


def _held(work: Path, *, shared: bool) -> Any:
    """Keep others out while shards are put together; object stores have no locks.

    Raises:
        CxrdistError: the work directory, which is removed in the end, is somebody else's.
    """
    if not isinstance(work, Path):
        return nullcontext()
    others = [path.name for path in work.glob("[!.]*")]
    if work.is_symlink() or (others and "pack.json" not in others):
        raise CxrdistError(f"{work}: expected an unfinished pack, found other files; move it away")
    make_private(work)
    return locked(work, shared=shared)


def _begin(work: Path, decoding: dict[str, object]) -> None:
    """Begin a pack, or make sure that the squares of an unfinished one are those of this one.

    Raises:
        CxrdistError: its squares were decoded of other images or in another way.
    """
    path = work / "pack.json"
    if not path.is_file():
        write_json(path, decoding)
        return
    before = read_document(path, dict[str, object], f"remove {work} to begin anew")
    for name, value in decoding.items():
        if before.get(name) != value:
            what = (
                "the list of images or of their text boxes or masks has changed since"
                if name == "images_sha256"
                else f"--{name.replace('_', '-')} was {before.get(name)}, is {value}"
            )
            raise CxrdistError(
                f"{work}: holds an unfinished pack of another kind ({what}); pack as before, or "
                "remove it to begin anew"
            )


def _decode(parts: list[Part], squares: Path, config: PackConfig) -> None:
    """Decode the parts of this task that are not there yet."""
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
    """Read what the workers found of each part; images of other views have that as their reason.

    Raises:
        CxrdistError: images are not decoded yet, or cannot be read and ``skip_bad`` is not set.
    """
    read = [read_part(work / "squares", part, redo_bad=False) for part in parts]
    found = [squares for squares in read if squares is not None]
    total, decoded = sum(len(part.records) for part in parts), sum(map(len, found))
    if decoded < total:
        raise CxrdistError(
            f"{work}: {total - decoded} of {total} images are not decoded yet; run all tasks "
            "before --merge"
        )
    rejected = [square for squares in found for square in squares if square.reason]
    if rejected and not config.skip_bad:
        rows = [(square.path, square.reason) for square in rejected]
        write_table(work / "rejected.csv", LeftOut._fields, rows)
        bad = {square.path for square in rejected}
        files = [str(r.file) for part in parts for r in part.records if r.path in bad]
        listed = f"all in {work / 'rejected.csv'}"
        if config.anonymise:  # that table has no name of a file
            listed = ", ".join(files[:MOST_NAMED]) + (" ..." if len(files) > MOST_NAMED else "")
        more = f" ({len(rejected)} such images, {listed})"
        raise CxrdistError(
            f"{files[0]}: {rejected[0].reason}{more if len(rejected) > 1 else ''}; "
            "mend or remove it, or leave it out with --skip-bad; what is decoded is kept"
        )
    return [
        [_with_reason(r, s, views) for r, s in zip(part.records, squares, strict=True)]
        for part, squares in zip(parts, found, strict=True)
    ]


def _with_reason(record: Record, square: Square, views: Views) -> Square:
    """The square, not to be used if a tag or the name of a DICOM file tells that it is not packed.

    It then has no say in the depth of the source either.
    """
    view = _view(record, square)
    if square.reason or view in views[record.origin]:
        return square
    return replace(square, reason=LEFT_OUT[view])


def _view(record: Record, square: Square) -> str:
    """The view by the table, else by a tag, else by the name, which anonymising has left alone."""
    return record.view or square.view or view_in_name(record.file.name)


def _with_one_depth(
    parts: list[Part],
    found: list[list[Square]],
    directory: Path,
    config: PackConfig,
    views: Views,
) -> list[list[Square]]:
    """Decode again what was scaled by another depth than the source's.

    Which images these are depends on the source alone, so any number of workers, tasks and kills
    ends with the same bytes.
    """
    squares = [square for part in found for square in part if not square.reason]
    depth = config.depth or source_depth(square.used_depth for square in squares)
    stale = [
        part
        for part, read in zip(parts, found, strict=True)
        if not all(square.reason or square.is_scaled_by(depth) for square in read)
    ]
    if not stale:
        return found
    total = sum(not square.is_scaled_by(depth) for square in squares)
    with progress(total, f"scaling by {depth} bits", "images") as bar:
        for count in _make(stale, directory, config, depth):
            bar.update(count)
    # Once more: an image that cannot be read now no longer counts for the depth.
    found = _read_parts(parts, directory.parent, config, views)
    return _with_one_depth(parts, found, directory, config, views)


def _items(
    parts: list[Part], found: list[list[Square]], work: Path, config: PackConfig
) -> tuple[list[Item], Pngs]:
    """Return the images that were read, and where their PNGs are."""
    squares = [square for part in found for square in part]
    records = [record for part in parts for record in part.records]
    known = _with_tags(config, records, squares)
    pairs = zip(known, squares, strict=True)
    items = [
        Item(r, square, i, 2 * len(records) + i)
        for i, (r, square) in enumerate(pairs)
        if not square.reason
    ]
    return items, locate_pngs(work / "squares", found)


def _refuse_late_dicom(items: list[Item], work: Path) -> None:
    """Whether names are to be hidden was decided before the content of this file was known."""
    late = next((item.record.file for item in items if item.square.patient), None)
    if late is not None:
        raise CxrdistError(
            f"{late}: is a DICOM file of a patient, though not named as one; say --anonymise true "
            f"or --anonymise false, and remove {work} to begin anew"
        )


def _with_tags(
    config: PackConfig, records: Sequence[Record], squares: Sequence[Square]
) -> list[Record]:
    """Add what DICOM tags tell. A patient there becomes a number: the tag names a person."""
    numbers: dict[tuple[str, str], int] = {}  # of a patient in one of several sources
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
        print(f"{ageless} DICOM ages are not 0 to {MOST_YEARS:g} years, and left empty")
    _tell_views(records, squares)
    return known


def _tell_views(records: Sequence[Record], squares: Sequence[Square]) -> None:
    """Say where a tag names no known view, or another one than the table."""
    pairs = [(record.view, s.view) for record, s in zip(records, squares, strict=True)]
    unknown = sum(tag is None for _, tag in pairs)
    if unknown:
        print(f"{unknown} DICOM files have a tag of a view that is unknown here")
    differing = sum(disagree(told, tag or UNKNOWN) for told, tag in pairs)
    if differing:
        print(
            f"{differing} images have another view by their table than by their tag; the table's "
            "is taken"
        )
