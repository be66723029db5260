"""Pack: raw images -> WebDataset shards with an index and an audit."""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxrdist.config import PackConfig
from cxrdist.data.audit import Entry, audit, summary
from cxrdist.data.boxes import read_boxes
from cxrdist.data.duplicates import Duplicates, find_duplicates, join_groups
from cxrdist.data.images import decode_png
from cxrdist.data.index import FORMAT, SAMPLE_COLUMNS, Index, Sample, ShardEntry, read_index
from cxrdist.data.records import (
    NO_PATIENT,
    SPLITS,
    Record,
    Source,
    count_unmatched,
    differences,
    labels_of,
)
from cxrdist.data.shards import describe_shard, sample_key, write_shard
from cxrdist.data.sources import read_source
from cxrdist.data.splits import assign_splits, describe_split, group_by_patient
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
from cxrdist.run import locked, publish, read_json, remove, write_json, write_table
from cxrdist.terminal import progress, table

# What may differ between two calls that make the same shards.
NOT_CONTENT = ("out", "workers", "skip_bad", "task", "num_tasks", "merge", "expect", "text_boxes")


class Item(NamedTuple):
    """A record whose image was read, and the place of the PNG that is packed of it."""

    record: Record
    square: Square
    place: int

    def covered(self, num_records: int) -> "Item":
        """The item with its burned-in text covered, as far as it has some."""
        if not self.square.covered_bytes:
            return self
        square = replace(self.square, fingerprint=self.square.covered_fingerprint)
        return self._replace(square=square, place=num_records + self.place)


@dataclass(frozen=True)
class Shard:
    """A shard to be written: its split, its place among the split's shards, its items."""

    split: str
    number: int
    items: list[Item]

    @property
    def name(self) -> str:
        """File name, SPLIT-000000.tar."""
        return f"{self.split}-{self.number:06d}.tar"


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
                _assemble(config, source, items, pngs, here, rejected, content)
                publish(here / "shards", config.out)
            remove(work)
            print(f"packed {len(items)} images into {config.out}")


def _refuse_bad_options(config: PackConfig) -> None:
    refuse_below_one(config, "size", "shard_size", "workers", "num_tasks")
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
        _write_rejected(work / "rejected.csv", rejected)
        more = f" ({len(rejected)} such images, all in {work / 'rejected.csv'})"
        raise CxrdistError(
            f"{rejected[0].reason}{more if len(rejected) > 1 else ''}; "
            "mend or remove it, or leave it out with --skip-bad; what is decoded is kept"
        )
    known = _with_tags(records, squares)
    pairs = zip(known, squares, strict=True)
    items = [Item(r, square, i) for i, (r, square) in enumerate(pairs) if not square.reason]
    return items, locate_pngs(work / "squares", [part or [] for part in found]), rejected


def _write_rejected(path: Path, rejected: list[Square]) -> None:
    write_table(path, ("path", "reason"), [(square.path, square.reason) for square in rejected])


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


def _assemble(
    config: PackConfig,
    source: Source,
    items: list[Item],
    pngs: Pngs,
    work: Path,
    rejected: list[Square],
    content: dict[str, Any],
) -> None:
    """Find duplicates, draw splits, write shards, index and audit into ``work/shards``."""
    directory = work / "shards"
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.iterdir():  # of a killed pack; whole shards and their list stay
        if leftover.name.startswith(".") or not (
            leftover.suffix == ".tar" or leftover.name == "samples.csv"
        ):
            leftover.unlink()
    if rejected:
        _write_rejected(directory / "rejected.csv", rejected)
    _refuse_lost_classes(source, items, rejected)

    def pixels(place: int) -> NDArray[np.uint8]:
        return decode_png(pngs[items[place].place])

    duplicates = find_duplicates([_fingerprint(item) for item in items], pixels)
    if config.duplicates == "drop":
        items, duplicates = _drop(items, duplicates, directory / "dropped.csv")
    joined = config.duplicates == "join"
    splits = _draw_splits(config, source, items, duplicates if joined else None)
    items = _cover(config, items, splits, len(source.records))
    shards = _plan_shards(config, items, splits)
    _write_samples([_sample(shard, item) for shard in shards for item in shard.items], directory)
    entries = _write_shards(shards, pngs, directory)
    found = audit(_entries(items, splits), duplicates, pixels, source.classes, source.task)
    write_json(directory / "audit.json", found)
    index = _describe(config, source, shards, entries, directory / "samples.csv")
    if config.text_boxes:
        index["cover"] = _describe_cover(config, items, len(source.records))
    write_json(directory / "pack.json", content)
    write_json(directory / "index.json", index)
    _print_summary(config, source, items, directory, len(rejected))
    print(summary(found))


def _refuse_lost_classes(source: Source, items: list[Item], rejected: list[Square]) -> None:
    there = {label for item in items for label in labels_of(item.record.label)}
    lost = [name for name in source.classes if name not in there]
    if lost and rejected:
        raise CxrdistError(
            f"class {lost[0]!r} has no readable image; the first unreadable one is "
            f"{rejected[0].reason}"
        )


def _draw_splits(
    config: PackConfig, source: Source, items: list[Item], joined: Duplicates | None
) -> list[str]:
    """Choose the split of each item."""
    records = [item.record for item in items]
    groups = group_by_patient(records)
    if joined is not None:
        groups = join_groups(groups, joined.pairs)
    return assign_splits(replace(source, records=records), config.split, config.seed, groups)


def _cover(
    config: PackConfig, items: list[Item], splits: list[str], num_records: int
) -> list[Item]:
    """Take the covered squares of the split that is to be covered.

    Splits and duplicates are found before, so that they do not depend on what is covered.
    """
    chosen = SPLITS if config.cover_split == "all" else (config.cover_split,)
    return [
        item.covered(num_records) if split in chosen else item
        for item, split in zip(items, splits, strict=True)
    ]


def _plan_shards(config: PackConfig, items: list[Item], splits: list[str]) -> list[Shard]:
    """Choose the order of the samples in the shards."""
    shards = []
    for split in SPLITS:
        members = [item for item, name in zip(items, splits, strict=True) if name == split]
        random = np.random.Generator(np.random.Philox([config.seed, SPLITS.index(split)]))
        members = [members[i] for i in random.permutation(len(members))]
        shards += [
            Shard(split, number, members[start : start + config.shard_size])
            for number, start in enumerate(range(0, len(members), config.shard_size))
        ]
    return shards


def _write_samples(samples: list[Sample], directory: Path) -> None:
    """Write samples.csv before the shards: shards of other samples, if any, are removed."""
    keys = Counter(sample.key for sample in samples)
    clash = next((key for key, times in keys.items() if times > 1), None)
    if clash:
        raise CxrdistError(f"two images have the key {clash}; rename one of them")
    path = directory / "samples.csv"
    before = path.read_bytes() if path.is_file() else b""
    write_table(path, SAMPLE_COLUMNS, samples)
    if path.read_bytes() != before:
        for shard in directory.glob("*.tar"):
            shard.unlink()


def _write_shards(shards: list[Shard], pngs: Pngs, directory: Path) -> list[ShardEntry]:
    """Write the shards that are not there yet; their entries in the index."""
    entries = []
    total = sum(len(shard.items) for shard in shards)
    with progress(total, "writing", "images") as bar:
        for shard in shards:
            path = directory / shard.name
            if not path.is_file():
                write_shard(path, ((_about(item), pngs[item.place]) for item in shard.items))
            entries.append(describe_shard(path, len(shard.items)))
            bar.update(len(shard.items))
    return entries


def _about(item: Item) -> dict[str, Any]:
    """What a sample's KEY.json says."""
    record, square = item.record, item.square
    return {
        "key": sample_key(record.path),
        "label": record.label,
        "patient": record.patient,
        "source": record.source,
        "path": record.path,
        "view": record.view,
        "width_px": square.width_px,
        "height_px": square.height_px,
    }


def _fingerprint(item: Item) -> Any:
    return item.square.fingerprint


def _sample(shard: Shard, item: Item) -> Sample:
    record = item.record
    return Sample(
        key=sample_key(record.path),
        split=shard.split,
        shard=shard.name,
        label=record.label,
        patient=record.patient,
        source=record.source,
        path=record.path,
        sha256=_fingerprint(item).sha256,
    )


def _describe(
    config: PackConfig,
    source: Source,
    shards: list[Shard],
    entries: list[ShardEntry],
    samples: Path,
) -> dict[str, Any]:
    """The content of index.json."""
    splits = {}
    for split in SPLITS:
        own = [(s, e) for s, e in zip(shards, entries, strict=True) if s.split == split]
        labels = Counter(
            name
            for shard, _ in own
            for item in shard.items
            for name in labels_of(item.record.label)
        )
        splits[split] = {
            "samples": sum(len(shard.items) for shard, _ in own),
            "classes": {name: labels[name] for name in source.classes},
            "shards": [entry._asdict() for _, entry in own],
        }
    return {
        "format": FORMAT,
        "task": source.task,
        "classes": source.classes,
        "image_size_px": config.size,
        "fit": config.fit,
        "split": describe_split(source, config.split),
        "seed": config.seed,
        "samples_sha256": hashlib.sha256(samples.read_bytes()).hexdigest(),
        "splits": splits,
    }


def _describe_cover(config: PackConfig, items: list[Item], num_records: int) -> dict[str, Any]:
    """What index.json says of burned-in text that was covered; it says nothing where none was."""
    covered = [item for item in items if item.place >= num_records]
    return {
        "how": config.cover,
        "split": config.cover_split,
        "images": len(covered),
        "boxes": sum(len(item.record.boxes) for item in covered),
    }


def _drop(items: list[Item], duplicates: Duplicates, listed: Path) -> tuple[list[Item], Duplicates]:
    """Keep one image of those that are the same, none where their labels differ.

    Of an image that stands in several splits given by the source the test image stays.
    """
    rank = {"test": 0, "val": 1}
    groups = join_groups(range(len(items)), duplicates.pairs)
    members: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    dropped: dict[int, tuple[str, str]] = {}
    for places in members.values():
        places.sort(key=lambda place: rank.get(str(items[place].record.split), 2))
        first = items[places[0]].record
        agree = len({items[place].record.label for place in places}) == 1
        reason = "is the same image" if agree else "is the same image with another label"
        for place in places[1:] if agree else places if len(places) > 1 else ():
            dropped[place] = first.path, reason
    rows = [(items[place].record.path, *dropped[place]) for place in sorted(dropped)]
    write_table(listed, ("path", "as", "reason"), rows)
    print(f"{len(rows)} images are left out, since they stand in the source more than once")
    kept = [item for place, item in enumerate(items) if place not in dropped]
    return kept, Duplicates([], [])


def _entries(items: list[Item], splits: list[str]) -> list[Entry]:
    """What the audit needs to know of each item."""
    return [
        Entry(
            key=sample_key(item.record.path),
            path=item.record.path,
            split=split,
            label=item.record.label,
            patient=item.record.patient,
            source=item.record.source,
            view=item.record.view,
            width_px=item.square.width_px,
            height_px=item.square.height_px,
            fingerprint=_fingerprint(item),
        )
        for item, split in zip(items, splits, strict=True)
    ]


def _print_summary(
    config: PackConfig, source: Source, items: list[Item], directory: Path, num_rejected: int
) -> None:
    records = [item.record for item in items]
    print(table(class_by_split(read_index(directory)), ("class", *SPLITS, "all", "patients")))
    print(f"images of {len({record.patient for record in records})} patients, none in two splits")
    unmatched = count_unmatched(records)
    if unmatched:
        print(
            f"{unmatched} of {len(records)} images have no known patient and count as a patient "
            "each (--patient-pattern or a csv column `patient` tells them)"
        )
    if num_rejected:
        print(f"{num_rejected} unreadable images are listed in {config.out / 'rejected.csv'}")
    if config.text_boxes:
        cover = _describe_cover(config, items, len(source.records))
        print(
            f"burned-in text: {cover['boxes']} boxes in {cover['images']} images are covered "
            f"({config.cover}, {config.cover_split})"
        )
    for line in source.notes:
        print(f"{source.name}: {line}")
    for line in differences(source, config.expect):
        print(f"not as expected of {source.name}: {line}")


def class_by_split(index: Index) -> list[list[str]]:
    """Rows of the class x split table: images, with the patients of the class at the end."""
    counts = index.counts()
    rows = []
    for name in index.classes:
        images = [counts[split][name]["images"] for split in SPLITS]
        patients = sum(counts[split][name]["patients"] for split in SPLITS)
        rows.append([name, *map(str, images), str(sum(images)), str(patients)])
    held = Counter(sample.split for sample in index.samples)
    totals = [*(held[split] for split in SPLITS), len(index.samples)]
    return [*rows, ["all", *map(str, totals), str(len({s.patient for s in index.samples}))]]
