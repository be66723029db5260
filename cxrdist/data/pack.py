"""Pack: raw images -> WebDataset shards with an index and an audit."""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cxrdist.config import PackConfig
from cxrdist.data.assemble import Item, assemble, write_rejected
from cxrdist.data.boxes import read_boxes
from cxrdist.data.index import MOST_SIDE_PX
from cxrdist.data.records import NO_PATIENT, Record, Source
from cxrdist.data.sources import read_source
from cxrdist.data.squares import (
    Part,
    Pngs,
    Square,
    locate_pngs,
    make_squares,
    plan_parts,
    read_part,
)
from cxrdist.errors import CxrdistError, refuse_below_one
from cxrdist.run import locked, publish, read_json, remove, write_json
from cxrdist.terminal import progress

# What may differ between two calls that make the same shards.
NOT_CONTENT = ("out", "workers", "skip_bad", "task", "num_tasks", "merge", "expect", "text_boxes")


def pack(config: PackConfig) -> None:
    """Pack a source into a new directory of shards and print what is in it.

    The bytes depend on the source, the options and the seed, not on the number of workers or tasks.
    Until the directory appears, what is done stands in a hidden one beside it; after a kill the
    same command goes on with it.

    Raises:
        CxrdistError: bad options or source, an unreadable image without ``skip_bad``, or a source
            that was changed since the pack was begun.
        RunFailedError: the disk is full.
    """
    _refuse_bad_options(config)
    source = read_source(config)
    if config.text_boxes:
        source = _with_boxes(source, config.text_boxes)
    content = _content(config, source)
    work = config.out.with_name(f".{config.out.name}.partial")
    if _is_packed(config.out, work, content):
        return
    with _held(work, shared=config.task is not None):
        _begin(work, content)
        parts = plan_parts(source.records)
        if not config.merge:
            _decode(parts, work / "squares", config)
        if config.task is None:
            with _on_this_machine(work) as here:
                items, pngs, rejected = _read_items(parts, here, config)
                assemble(config, source, items, pngs, here, rejected, content)
                publish(here / "shards", config.out)
            remove(work)
            print(f"packed {len(items)} images into {config.out}")


def _refuse_bad_options(config: PackConfig) -> None:
    refuse_below_one(config, "size", "shard_size", "workers", "num_tasks")
    if config.size > MOST_SIDE_PX:
        raise CxrdistError(f"--size {config.size}: expected at most {MOST_SIDE_PX} px")
    if (config.task is None) != (config.num_tasks is None):
        raise CxrdistError("--task and --num-tasks: go together, such as --task 0 --num-tasks 4")
    if config.task is not None and config.num_tasks is not None:
        if config.merge:
            raise CxrdistError("--merge: comes after the tasks, without --task")
        if not 0 <= config.task < config.num_tasks:
            raise CxrdistError(f"--task {config.task}: expected 0 to {config.num_tasks - 1}")
    if not config.text_boxes and (config.cover, config.cover_split) != ("black", "all"):
        raise CxrdistError("--cover, --cover-split: need --text-boxes, see cxrdist find-text")
    if not config.out.name:
        raise CxrdistError(f"--out {config.out}: expected the name of a directory to make")


def _with_boxes(source: Source, file: Path) -> Source:
    """Give each record its boxes of burned-in text."""
    boxes = read_boxes(file)
    records = [replace(r, boxes=boxes.get(r.path, ())) for r in source.records]
    strangers = sorted(boxes.keys() - {record.path for record in records})
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


def _content(config: PackConfig, source: Source) -> dict[str, Any]:
    """All that decides the bytes of the shards but the images themselves."""
    options = {name: v for name, v in asdict(config).items() if name not in NOT_CONTENT}
    digest = hashlib.sha256()
    for record in source.records:
        columns = (record.path, record.label, record.patient, record.source)
        digest.update("\0".join((*columns, str(record.split), record.view, "\n")).encode())
        digest.update(repr([box[:4] for box in record.boxes]).encode() if record.boxes else b"")
    return {**options, "input": str(config.input), "records_sha256": digest.hexdigest()}


def _is_packed(out: Path, work: Path, content: dict[str, Any]) -> bool:
    """Whether the shards stand already; a kill may have left the work directory.

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
    """Keep others out while shards are put together; object stores have no locks."""
    return locked(work, shared=shared) if isinstance(work, Path) else nullcontext()


def _begin(work: Path, content: dict[str, Any]) -> None:
    """Begin a pack, or make sure that it is this one that goes on.

    Raises:
        CxrdistError: another was begun here.
    """
    path = work / "pack.json"
    if not path.is_file():
        write_json(path, content)
        return
    before = read_json(path)
    for name, value in content.items():
        if before.get(name) != value:
            what = (
                "the list of images or what is said of them has changed since"
                if name == "records_sha256"
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
        made = make_squares(missing, squares, config.size, config.fit, config.workers, config.cover)
        for count in made:
            bar.update(count)
    if config.task is not None:
        print(f"task {config.task} of {config.num_tasks}: {total} images are decoded")


@contextmanager
def _on_this_machine(work: Path) -> Iterator[Path]:
    """Yield the work directory, or a local copy of a remote one."""
    if isinstance(work, Path):
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="cxrdist-") as here:
        work.fs.get(f"{work.path}/squares", f"{here}/squares", recursive=True)
        yield Path(here)


def _read_items(
    parts: list[Part], work: Path, config: PackConfig
) -> tuple[list[Item], Pngs, list[Square]]:
    """What the workers found: the items, where their PNGs are, and what could not be read.

    Raises:
        CxrdistError: images are not decoded yet, or cannot be read and ``skip_bad`` is not set.
    """
    found = [read_part(work / "squares", part, redo_bad=False) for part in parts]
    missing = sum(len(p.records) for p, f in zip(parts, found, strict=True) if f is None)
    if missing:
        total = sum(len(part.records) for part in parts)
        raise CxrdistError(
            f"{work}: {missing} of {total} images are not decoded yet; run all tasks before --merge"
        )
    squares = [square for part in found for square in part or ()]
    records = [record for part in parts for record in part.records]
    rejected = [square for square in squares if square.reason]
    if rejected and not config.skip_bad:
        write_rejected(work / "rejected.csv", rejected)
        more = f" ({len(rejected)} such images, all in {work / 'rejected.csv'})"
        raise CxrdistError(
            f"{rejected[0].reason}{more if len(rejected) > 1 else ''}; "
            "mend or remove it, or leave it out with --skip-bad; what is decoded is kept"
        )
    known = _with_tags(records, squares)
    pairs = zip(known, squares, strict=True)
    items = [Item(r, square, i) for i, (r, square) in enumerate(pairs) if not square.reason]
    return items, locate_pngs(work / "squares", [part or [] for part in found]), rejected


def _with_tags(records: Sequence[Record], squares: Sequence[Square]) -> list[Record]:
    """Add what DICOM tags tell. A patient there becomes a number: the tag names a person."""
    numbers: dict[str, int] = {}
    known = []
    for record, square in zip(records, squares, strict=True):
        if square.patient and record.patient.startswith(NO_PATIENT):
            number = numbers.setdefault(square.patient, len(numbers) + 1)
            record = replace(record, patient=f"dicom-{number:06d}")
        known.append(replace(record, view=record.view or square.view))
    return known
