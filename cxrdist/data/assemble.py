"""Assemble: decoded squares -> duplicates, splits, shards, index and audit."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrdist.config import PackConfig
from cxrdist.data.audit import Entry, audit, summary
from cxrdist.data.depth import describe_depth
from cxrdist.data.duplicates import Duplicates, find_duplicates, join_groups
from cxrdist.data.findings import Finding
from cxrdist.data.found import LeftOut
from cxrdist.data.geometry import clipped, in_square
from cxrdist.data.images import decode_png
from cxrdist.data.index import (
    SAMPLE_COLUMNS,
    CoverEntry,
    IndexFile,
    Sample,
    ShardEntry,
    SplitEntry,
    SquaresEntry,
    read_index,
    shard_name,
)
from cxrdist.data.labels import agree, joined, labels_of
from cxrdist.data.masks import describe_masks, masks_line
from cxrdist.data.records import SPLITS, Source
from cxrdist.data.shards import Packed, SampleFile, describe_shard, sample_key, write_shard
from cxrdist.data.splits import assign_splits, describe_split, group_by_patient, split_notes
from cxrdist.data.squares import Square
from cxrdist.data.summary import count_fates, print_summary
from cxrdist.data.views import LEFT_OUT
from cxrdist.errors import CxrdistError
from cxrdist.files import read_json, write_json, write_table
from cxrdist.terminal import progress, table


@dataclass(frozen=True)
class Shard:
    """A shard to write: its split, its number among the split's shards, its squares."""

    split: str
    number: int
    squares: list[Square]

    @property
    def name(self) -> str:
        """File name, SPLIT-000000.tar."""
        return shard_name(self.split, self.number)


def assemble(
    config: PackConfig,
    source: Source,
    squares: list[Square],
    work: Path,
    content: dict[str, object],
) -> int:
    """Find duplicates, draw splits, write shards, index and audit into ``work/shards``.

    Returns:
        The number of packed images.
    """
    directory, parts = work / "shards", work / "squares"
    _begin(directory, content)
    rejected = [square for square in squares if square.reason]
    squares = [square for square in squares if not square.reason]
    _refuse_lost_classes(source, squares, rejected)

    def pixels(number: int) -> NDArray[np.uint8]:
        return decode_png(squares[number].png(parts))

    duplicates = find_duplicates([_fingerprint(square) for square in squares], pixels)
    num_read = len(squares)
    if config.duplicates == "drop":
        squares, duplicates = _drop(squares, duplicates, directory / "dropped.csv")
    left_out = (*source.left_out, *(LeftOut(s.record.path, s.reason) for s in rejected))
    if left_out:
        write_table(directory / "rejected.csv", LeftOut._fields, sorted(left_out))
    fates = count_fates(source, len(squares), [s.reason for s in rejected], num_read - len(squares))
    packed = replace(source, records=[square.record for square in squares])
    groups = group_by_patient(packed.records)
    if config.duplicates == "join":
        groups = join_groups(groups, duplicates.pairs)
    splits = assign_splits(packed, config.split, config.seed, groups)
    squares = _cover(config, squares, splits)
    shards = _plan_shards(config, squares, splits)
    samples = _write_samples(shards, directory)
    entries = _write_shards(config, shards, parts, directory)
    audit_file = audit(
        _entries(squares, samples),
        duplicates,
        pixels,
        source.classes,
        source.task,
        thumbnails=lambda number: squares[number].thumbnail(parts),
    )
    write_json(directory / "audit.json", audit_file)
    index = _describe(config, packed, shards, entries, directory / "samples.csv")
    index |= _describe_squares(squares)
    if config.lungs_only:
        index["lungs_only"] = True
    if config.text_boxes:
        index["cover"] = describe_cover(config, squares)
    write_json(directory / "index.json", index)
    print_summary(config, _of_views(source, rejected), packed.records, read_index(directory))
    for line in _lines(config, squares, index):
        print(line)
    for line in split_notes(packed, config.split, groups, splits):
        print(f"splits: {line}")
    print(summary(audit_file))
    print(table(fates, ("files", "")))
    if left_out:
        print(f"{config.out / 'rejected.csv'}: the files left out, with the reason of each")
    return len(squares)


def _begin(directory: Path, content: dict[str, object]) -> None:
    """Remove the files of a killed pack, except complete shards and their list of the same pack.

    The options are compared, since equal squares can be packed into different shards.
    """
    directory.mkdir(parents=True, exist_ok=True)
    options = directory / "pack.json"
    same = options.is_file() and read_json(options) == content
    for leftover in directory.iterdir():
        whole = leftover.suffix == ".tar" or leftover.name in ("samples.csv", "pack.json")
        if leftover.name.startswith(".") or not (same and whole):
            leftover.unlink()
    write_json(options, content)


def _refuse_lost_classes(source: Source, squares: list[Square], rejected: list[Square]) -> None:
    """Check that each class has an image left.

    In a multilabel source a label may lose all its images if they have views that are not packed.
    """
    other_views = LEFT_OUT.values() if source.task == "multilabel" else ()
    reasons = {square.record.path: square.reason for square in rejected}
    there = {label for square in squares for label in labels_of(square.record.label)}
    for record in source.records:
        reason = reasons.get(record.path, "")
        lost = [label for label in labels_of(record.label) if label not in there]
        if reason and reason not in other_views and lost:
            raise CxrdistError(
                f"class {lost[0]!r} has no image left; add images of it, or repair those that are "
                f"left out, first {record.file}: {reason}"
            )


def _of_views(source: Source, rejected: list[Square]) -> Source:
    """Return the source without images that have views which are not packed, for the counts."""
    others = {square.record.path for square in rejected if square.reason in LEFT_OUT.values()}
    return replace(source, records=[r for r in source.records if r.path not in others])


def _cover(config: PackConfig, squares: list[Square], splits: list[str]) -> list[Square]:
    """Use the covered squares in the split to be covered.

    Splits and duplicates are determined before, so that they do not depend on what is covered.
    """
    chosen = SPLITS if config.cover_split == "all" else (config.cover_split,)
    return [
        square.cover() if split in chosen else square
        for square, split in zip(squares, splits, strict=True)
    ]


def _drop(
    squares: list[Square], duplicates: Duplicates, listed: Path
) -> tuple[list[Square], Duplicates]:
    """Keep one image of each group of copies, none if their labels differ.

    If the source gives the copies several splits, the one in test is kept.
    """
    rank = {"test": 0, "val": 1}
    groups = join_groups(range(len(squares)), duplicates.pairs)
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    dropped: dict[int, tuple[str, str]] = {}
    for copies in members.values():
        copies.sort(key=lambda i: rank.get(str(squares[i].record.split), 2))
        first = squares[copies[0]].record
        records = [squares[i].record for i in copies]
        alike = agree(
            (record.label, joined(record.uncertain, record.missing)) for record in records
        )
        reason = "is the same image" if alike else "is the same image with another label"
        for i in copies[1:] if alike else copies if len(copies) > 1 else ():
            dropped[i] = first.path, reason
    rows = [(squares[i].record.path, *dropped[i]) for i in sorted(dropped)]
    write_table(listed, ("path", "as", "reason"), rows)
    kept = [square for i, square in enumerate(squares) if i not in dropped]
    return kept, Duplicates([], [])


def _plan_shards(config: PackConfig, squares: list[Square], splits: list[str]) -> list[Shard]:
    """Choose the order of the samples in the shards."""
    shards = []
    for split in SPLITS:
        members = [square for square, name in zip(squares, splits, strict=True) if name == split]
        random = np.random.Generator(np.random.Philox([config.seed, SPLITS.index(split)]))
        members = [members[i] for i in random.permutation(len(members))]
        shards += [
            Shard(split, number, members[start : start + config.shard_size])
            for number, start in enumerate(range(0, len(members), config.shard_size))
        ]
    return shards


def _write_samples(shards: list[Shard], directory: Path) -> list[Sample]:
    """Write samples.csv before the shards; if it has changed, remove shards written before."""
    samples = [_sample(shard, square) for shard in shards for square in shard.squares]
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
    return samples


def _write_shards(
    config: PackConfig, shards: list[Shard], parts: Path, directory: Path
) -> list[ShardEntry]:
    """Write the missing shards; return the index entries of all."""
    entries = []
    total = sum(len(shard.squares) for shard in shards)
    with progress(total, "writing", "images") as bar:
        for shard in shards:
            path = directory / shard.name
            if not path.is_file():
                write_shard(path, (_packed(config, square, parts) for square in shard.squares))
            entries.append(describe_shard(path, len(shard.squares)))
            bar.update(len(shard.squares))
    return entries


def _packed(config: PackConfig, square: Square, parts: Path) -> Packed:
    """Return the files of a sample."""
    return Packed(_about(config, square), square.png(parts), square.mask(parts))


def _about(config: PackConfig, square: Square) -> SampleFile:
    """Return the content of a sample's KEY.json."""
    record = square.record
    about: SampleFile = {
        "key": sample_key(record.path),
        "label": record.label,
        "patient": record.patient,
        "source": record.source,
        "path": record.path,
        "view": record.view,
        "width_px": square.width_px,
        "height_px": square.height_px,
        "sex": record.sex,
        "age": record.age,
        "uncertain": record.uncertain,
        "missing": record.missing,
        "assumed_absent": record.assumed_absent,
    }
    if record.findings:
        about["boxes"] = _boxes(config, square)
    return about


def _boxes(config: PackConfig, square: Square) -> list[Finding]:
    """Return the boxes of a record's findings in px of its square, clipped to it."""
    original = square.width_px, square.height_px
    there = (in_square(f, *original, config.size, config.fit) for f in square.record.findings)
    return [box for box in (clipped(f, config.size) for f in there) if box is not None]


def _lines(config: PackConfig, squares: list[Square], index: IndexFile) -> Iterator[str]:
    """Yield lines for the user about depths, masks and boxes, if there are any."""
    if depth := index.get("depth"):
        yield describe_depth(depth, [square.used_depth for square in squares])
    if masks := index.get("masks"):
        yield masks_line(masks, len(squares))
    with_boxes = [square for square in squares if square.record.findings]
    num_boxes = sum(len(square.record.findings) for square in with_boxes)
    lost = num_boxes - sum(len(_boxes(config, square)) for square in with_boxes)
    if num_boxes:
        outside = f"; {lost} lie outside of the square and are left out" if lost else ""
        yield f"findings: {num_boxes} boxes in {len(with_boxes)} images{outside}"


def _fingerprint(square: Square) -> Any:
    return square.fingerprint


def _sample(shard: Shard, square: Square) -> Sample:
    record = square.record
    return Sample(
        key=sample_key(record.path),
        split=shard.split,
        shard=shard.name,
        label=record.label,
        patient=record.patient,
        source=record.source,
        path=record.path,
        sha256=_fingerprint(square).sha256,
        sex=record.sex,
        age="" if record.age is None else f"{record.age:.4g}",
        view=record.view,
        uncertain=record.uncertain,
        missing=record.missing,
        assumed_absent=record.assumed_absent,
        mask_sha256=square.mask_sha256,
    )


def _entries(squares: list[Square], samples: list[Sample]) -> list[Entry]:
    """Return what the audit needs to know of each square, in the order of the squares."""
    by_path = {sample.path: sample for sample in samples}
    return [
        Entry(
            by_path[square.record.path],
            square.width_px,
            square.height_px,
            _fingerprint(square),
            square.mask_share if square.mask_sha256 else None,
        )
        for square in squares
    ]


def _describe(
    config: PackConfig,
    source: Source,
    shards: list[Shard],
    entries: list[ShardEntry],
    samples: Path,
) -> IndexFile:
    """Return the content of index.json."""
    splits: dict[str, SplitEntry] = {}
    for split in SPLITS:
        own = [(s, e) for s, e in zip(shards, entries, strict=True) if s.split == split]
        labels = Counter(
            name
            for shard, _ in own
            for square in shard.squares
            for name in labels_of(square.record.label)
        )
        splits[split] = {
            "samples": sum(len(shard.squares) for shard, _ in own),
            "classes": {name: labels[name] for name in source.classes},
            "shards": [entry for _, entry in own],
        }
    return {
        "format": "cxrdist-shards-1",
        "task": source.task,
        "classes": source.classes,
        "image_size_px": config.size,
        "fit": config.fit,
        "split": describe_split(source, config.split),
        "seed": config.seed,
        "samples_sha256": hashlib.sha256(samples.read_bytes()).hexdigest(),
        "splits": splits,
    }


def _describe_squares(squares: list[Square]) -> SquaresEntry:
    """Return the fields of index.json on depths and masks."""
    masks = describe_masks([square.mask_share for square in squares if square.mask_sha256])
    depth = next((square.depth for square in squares if square.depth), None)
    return {"depth": depth, "masks": masks} if masks else {"depth": depth}


def describe_cover(config: PackConfig, squares: list[Square]) -> CoverEntry:
    """Return the entry of index.json on covered burned-in text; only for packs that cover some."""
    covered = [square for square in squares if square.covered]
    return {
        "how": config.cover,
        "split": config.cover_split,
        "images": len(covered),
        "boxes": sum(len(square.record.boxes) for square in covered),
    }
