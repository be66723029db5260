"""Assemble: decoded squares -> duplicates, splits, samples.csv and shards."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cxrdist.config import CoverHow, CoverSplit, Fit
from cxrdist.data.duplicates import Duplicates, find_duplicates, join_groups
from cxrdist.data.findings import Finding
from cxrdist.data.found import LeftOut
from cxrdist.data.geometry import clipped, in_square
from cxrdist.data.images import decode_png
from cxrdist.data.index import SAMPLE_COLUMNS, Sample, ShardEntry, shard_name
from cxrdist.data.labels import agree, joined, labels_of
from cxrdist.data.records import SPLITS, Source
from cxrdist.data.shards import SHARED_COLUMNS, describe_shard, sample_key, write_shard
from cxrdist.data.splits import assign_splits, group_by_patient
from cxrdist.data.squares import Square
from cxrdist.data.views import LEFT_OUT
from cxrdist.errors import CxrdistError
from cxrdist.files import read_json, write_json, write_table
from cxrdist.terminal import progress

ShardPlan = dict[str, list[int]]  # positions of the squares of each shard, by its file name


@dataclass(frozen=True)
class Layout:
    """The options that decide how squares become shards, as in `cxrdist.config.PackConfig`.

    ``cover`` is None without --text-boxes.
    """

    size_px: int
    fit: Fit
    split: str | None
    seed: int
    shard_size: int
    duplicates: Literal["join", "drop", "report"]
    cover: CoverHow | None
    cover_split: CoverSplit


@dataclass(frozen=True)
class Assembled:
    """The shards that were written, and what was found on the way."""

    source: Source
    """With the packed records only."""
    squares: list[Square]
    """Of these records."""
    samples: list[Sample]
    """Of these squares."""
    entries: list[ShardEntry]
    rejected: list[Square]
    """Left out for a reason."""
    num_copies: int
    """Number of squares that were dropped as copies."""
    duplicates: Duplicates
    """By position in ``squares``."""
    groups: list[int]
    """A number per square; those with the same number are in one split."""


def assemble(
    source: Source, squares: list[Square], work: Path, content: dict[str, object], layout: Layout
) -> Assembled:
    """Find duplicates, draw splits, and write samples.csv and shards into ``work/shards``."""
    directory, parts = work / "shards", work / "squares"
    _begin(directory, content)
    rejected = [square for square in squares if square.reason]
    usable = [square for square in squares if not square.reason]
    _refuse_lost_classes(source, usable, rejected)
    duplicates = find_duplicates(
        [square.fingerprint for square in usable],
        lambda number: decode_png(usable[number].png(parts)),
    )
    squares = usable
    if layout.duplicates == "drop":
        squares = _drop(usable, duplicates, directory / "dropped.csv")
        # No group of copies has two images left, and positions have changed.
        duplicates = Duplicates([], [])
    left_out = (*source.left_out, *(LeftOut(s.record.path, s.reason) for s in rejected))
    if left_out:
        write_table(directory / "rejected.csv", LeftOut._fields, sorted(left_out))
    packed = replace(source, records=[square.record for square in squares])
    groups = group_by_patient(packed.records)
    if layout.duplicates == "join":
        groups = join_groups(groups, duplicates.pairs)
    splits = assign_splits(packed, layout.split, layout.seed, groups)
    squares = _cover(squares, splits, layout.cover_split)
    plan = plan_shards(splits, layout.seed, layout.shard_size)
    samples = write_samples(squares, plan, directory)
    with progress(len(squares), "writing", "images") as bar:
        entries = []
        for name, members in plan.items():
            chosen = [(samples[i], squares[i]) for i in members]
            entries.append(_write_shard(directory / name, chosen, parts, layout))
            bar.update(len(members))
    num_copies = len(usable) - len(squares)
    return Assembled(packed, squares, samples, entries, rejected, num_copies, duplicates, groups)


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
    # Last: after a kill above, the new options must not make leftovers of others look like ours.
    write_json(options, content)


def _refuse_lost_classes(source: Source, squares: list[Square], rejected: list[Square]) -> None:
    """Check that each class has an image left.

    A label of a multilabel source may lose all its images, if their views are not packed.
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


def _drop(squares: list[Square], duplicates: Duplicates, listed: Path) -> list[Square]:
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
        # So that an official test set stays complete. The sort keeps the order within a split.
        copies.sort(key=lambda i: rank.get(str(squares[i].record.split), 2))
        first = squares[copies[0]].record
        records = [squares[i].record for i in copies]
        alike = agree(
            (record.label, joined(record.uncertain, record.missing)) for record in records
        )
        reason = "is the same image" if alike else "is the same image with another label"
        for i in copies[1:] if alike else copies:  # a single image is alike
            dropped[i] = first.path, reason
    rows = [(squares[i].record.path, *dropped[i]) for i in sorted(dropped)]
    write_table(listed, ("path", "as", "reason"), rows)
    return [square for i, square in enumerate(squares) if i not in dropped]


def _cover(squares: list[Square], splits: list[str], cover_split: CoverSplit) -> list[Square]:
    """Use the covered squares in the split to be covered.

    Splits and duplicates are determined before, so that they do not depend on what is covered.
    """
    chosen = SPLITS if cover_split == "all" else (cover_split,)
    return [
        square.cover() if split in chosen else square
        for square, split in zip(squares, splits, strict=True)
    ]


def plan_shards(splits: list[str], seed: int, shard_size: int) -> ShardPlan:
    """Choose the order of the samples in the shards, from the split of each square."""
    plan = {}
    for split in SPLITS:
        members = [i for i, name in enumerate(splits) if name == split]
        # Records are sorted by path, often class after class, and a WebDataset client shuffles only
        # within a buffer. A generator per split: its order does not depend on the other splits.
        random = np.random.Generator(np.random.Philox([seed, SPLITS.index(split)]))
        members = [members[i] for i in random.permutation(len(members))]
        for number, start in enumerate(range(0, len(members), shard_size)):
            plan[shard_name(split, number)] = members[start : start + shard_size]
    return plan


def write_samples(squares: list[Square], plan: ShardPlan, directory: Path) -> list[Sample]:
    """Write samples.csv before the shards, and return the sample of each square.

    If the table changes, shards that were written before are removed.
    """
    samples = {i: _sample(squares[i], name) for name, members in plan.items() for i in members}
    keys = Counter(sample.key for sample in samples.values())
    clash = next((key for key, times in keys.items() if times > 1), None)
    if clash:
        raise CxrdistError(f"two images have the key {clash}; rename one of them")
    path, new = directory / "samples.csv", directory / "samples.csv.new"
    write_table(new, SAMPLE_COLUMNS, samples.values())
    # Equal options can give other rows: with --skip-bad a file may have been repaired meanwhile.
    if path.is_file() and path.read_bytes() != new.read_bytes():
        # Before the new table is there: after a kill in between, the difference is still seen.
        for shard in directory.glob("*.tar"):
            shard.unlink()
    new.replace(path)
    return [samples[i] for i in range(len(squares))]


def _sample(square: Square, shard: str) -> Sample:
    record = square.record
    return Sample(
        key=sample_key(record.path),
        split=shard.split("-")[0],
        shard=shard,
        label=record.label,
        patient=record.patient,
        source=record.source,
        path=record.path,
        sha256=square.fingerprint.sha256,
        sex=record.sex,
        age="" if record.age is None else f"{record.age:.4g}",
        view=record.view,
        uncertain=record.uncertain,
        missing=record.missing,
        assumed_absent=record.assumed_absent,
        mask_sha256=square.mask_sha256,
    )


def _write_shard(
    path: Path, chosen: list[tuple[Sample, Square]], parts: Path, layout: Layout
) -> ShardEntry:
    """Write a shard if it is missing; return its index entry."""
    files = ((_sample_file(sample, s, layout), s.png(parts), s.mask(parts)) for sample, s in chosen)
    # An existing one has these samples: `write_samples` has removed all others.
    if not path.is_file():
        write_shard(path, files)
    return describe_shard(path, len(chosen))


def _sample_file(sample: Sample, square: Square, layout: Layout) -> dict[str, Any]:
    """Return the content of a sample's KEY.json."""
    description = {column: getattr(sample, column) for column in (*SHARED_COLUMNS, "sex")}
    description |= {
        "width_px": square.width_px,
        "height_px": square.height_px,
        "age": square.record.age,
    }
    if square.record.findings:
        description["boxes"] = [box._asdict() for box in findings_in_square(square, layout)]
    return description


def findings_in_square(square: Square, layout: Layout) -> list[Finding]:
    """Return the boxes of a record's findings in px of its square, clipped to it."""
    original = square.width_px, square.height_px
    there = (in_square(f, *original, layout.size_px, layout.fit) for f in square.record.findings)
    return [box for box in (clipped(f, layout.size_px) for f in there) if box is not None]
