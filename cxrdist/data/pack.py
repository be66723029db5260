"""Pack: raw images -> WebDataset shards with an index."""

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cxrdist.config import PackConfig
from cxrdist.data.images import encode_png, read_square
from cxrdist.data.index import FORMAT, SAMPLE_COLUMNS, read_index
from cxrdist.data.records import SPLITS, Record, Source, count_unmatched, labels_of, read_source
from cxrdist.data.splits import assign_splits
from cxrdist.errors import CxrdistError
from cxrdist.run import atomic_directory, write_table
from cxrdist.terminal import progress, table


class Packed(NamedTuple):
    """A square as it goes into a shard: its PNG bytes and the sha256 of its pixels."""

    png: bytes
    sha256: str


@dataclass(frozen=True)
class Shard:
    """A shard to be written: its split, its place among the split's shards, its records."""

    split: str
    number: int
    records: list[Record]

    @property
    def name(self) -> str:
        """File name, SPLIT-000000.tar."""
        return f"{self.split}-{self.number:06d}.tar"


def pack(config: PackConfig) -> None:
    """Pack a source into a new directory of shards and print the class x split table.

    The bytes depend on the source, the options and the seed, not on the number of workers. The
    directory appears by rename when everything in it is complete.

    Raises:
        CxrdistError: bad options or source, or an unreadable image without ``skip_bad``.
    """
    _refuse_bad_options(config)
    source = read_source(config)
    records = source.records
    with _pool(config.workers) as pool:
        rejected: list[tuple[Record, str]] = []
        if config.skip_bad:
            records, rejected = _separate_bad(records, config, pool)
        source = replace(source, records=records)
        shards = _plan_shards(source, config)
        with atomic_directory(config.out) as directory:
            samples, rows = _write_shards(shards, directory, config, pool)
            write_table(directory / "samples.csv", SAMPLE_COLUMNS, samples)
            if rejected:
                bad = [(record.path, reason) for record, reason in rejected]
                write_table(directory / "rejected.csv", ("path", "reason"), bad)
            index = _describe(config, source, shards, rows, directory / "samples.csv")
            (directory / "index.json").write_text(json.dumps(index, indent=2) + "\n")
    _print_summary(config, records, len(rejected))


def _refuse_bad_options(config: PackConfig) -> None:
    for name, value in (("size", config.size), ("shard-size", config.shard_size)):
        if value < 1:
            raise CxrdistError(f"--{name} {value}: expected a number above 0")
    if config.workers is not None and config.workers < 1:
        raise CxrdistError(f"--workers {config.workers}: expected a number above 0")
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise CxrdistError(f"--out {config.out}: stands already; remove it or choose another name")


@contextmanager
def _pool(workers: int | None) -> Iterator[ProcessPoolExecutor | None]:
    """Processes to decode with; None stands for this process alone."""
    count = workers or len(os.sched_getaffinity(0))
    if count == 1:
        yield None
        return
    with ProcessPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _square(size_px: int, fit: str, file: Path) -> Packed:
    pixels = read_square(file, size_px, fit)
    return Packed(encode_png(pixels), hashlib.sha256(pixels.tobytes()).hexdigest())


def _reason_unreadable(size_px: int, fit: str, file: Path) -> str | None:
    try:
        read_square(file, size_px, fit)
    except CxrdistError as error:
        return str(error)
    return None


def _map(function: Any, files: list[Path], pool: ProcessPoolExecutor | None) -> Iterator[Any]:
    return map(function, files) if pool is None else pool.map(function, files, chunksize=4)


def _separate_bad(
    records: list[Record], config: PackConfig, pool: ProcessPoolExecutor | None
) -> tuple[list[Record], list[tuple[Record, str]]]:
    """Find unreadable images before the splits are drawn, so that the splits keep their sizes."""
    function = partial(_reason_unreadable, config.size, config.fit)
    good, bad = [], []
    with progress(len(records), "checking", "images") as bar:
        reasons = _map(function, [record.file for record in records], pool)
        for record, reason in zip(records, reasons, strict=True):
            if reason is None:
                good.append(record)
            else:
                bad.append((record, reason))
            bar.update()
    lost = {record.label for record in records} - {record.label for record in good}
    if lost:
        raise CxrdistError(
            f"--input {config.input}: class {sorted(lost)[0]!r} has no readable image; "
            f"the first is {next(reason for r, reason in bad if r.label == sorted(lost)[0])}"
        )
    return good, bad


def _plan_shards(source: Source, config: PackConfig) -> list[Shard]:
    records = source.records
    splits = assign_splits(source, config.split, config.seed)
    shards = []
    for split in SPLITS:
        members = [r for r, s in zip(records, splits, strict=True) if s == split]
        random = np.random.Generator(np.random.Philox([config.seed, SPLITS.index(split)]))
        members = [members[i] for i in random.permutation(len(members))]
        shards += [
            Shard(split, number, members[start : start + config.shard_size])
            for number, start in enumerate(range(0, len(members), config.shard_size))
        ]
    return shards


def sample_key(path: str) -> str:
    """Stable key of a sample from its path in the source.

    WebDataset cuts a name at its first dot, so a key has none; the hash keeps keys apart that look
    alike once cleaned.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).stem)[:40].strip("-")
    return f"{stem}-{hashlib.sha256(path.encode()).hexdigest()[:10]}"


def _write_shards(
    shards: list[Shard], directory: Path, config: PackConfig, pool: ProcessPoolExecutor | None
) -> tuple[list[tuple[str, ...]], list[dict[str, Any]]]:
    """Write all shards; give the rows of samples.csv and the shards' entries in the index."""
    samples: list[tuple[str, ...]] = []
    entries: list[dict[str, Any]] = []
    files = [record.file for shard in shards for record in shard.records]
    squares = _map(partial(_square, config.size, config.fit), files, pool)
    with progress(len(files), "packing", "images") as bar:
        for shard in shards:
            path = directory / shard.name
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for record in shard.records:
                    square: Packed = next(squares)
                    samples.append(_write_sample(tar, shard, record, square))
                    bar.update()
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            entries.append(
                {
                    "name": shard.name,
                    "samples": len(shard.records),
                    "bytes": len(data),
                    "sha256": digest,
                }
            )
    keys = Counter(row[0] for row in samples)
    clash = next((key for key, times in keys.items() if times > 1), None)
    if clash:
        raise CxrdistError(f"two images have the key {clash}; rename one of them")
    return samples, entries


def _write_sample(
    tar: tarfile.TarFile, shard: Shard, record: Record, square: Packed
) -> tuple[str, ...]:
    key = sample_key(record.path)
    about = {
        "key": key,
        "label": record.label,
        "patient": record.patient,
        "source": record.source,
        "path": record.path,
    }
    _add(tar, f"{key}.json", json.dumps(about, sort_keys=True).encode())
    _add(tar, f"{key}.png", square.png)
    return (
        key,
        shard.split,
        shard.name,
        record.label,
        record.patient,
        record.source,
        record.path,
        square.sha256,
    )


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time, owner and group 0: the same bytes every time
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _describe(
    config: PackConfig,
    source: Source,
    shards: list[Shard],
    entries: list[dict[str, Any]],
    samples: Path,
) -> dict[str, Any]:
    classes = source.classes
    splits = {}
    for split in SPLITS:
        own = [(s, e) for s, e in zip(shards, entries, strict=True) if s.split == split]
        labels = Counter(
            name for shard, _ in own for record in shard.records for name in labels_of(record.label)
        )
        splits[split] = {
            "samples": sum(len(shard.records) for shard, _ in own),
            "classes": {name: labels[name] for name in classes},
            "shards": [entry for _, entry in own],
        }
    given = shards[0].records[0].split is not None
    return {
        "format": FORMAT,
        "task": source.task,
        "classes": classes,
        "image_size_px": config.size,
        "fit": config.fit,
        "split": "given by the source" if given else config.split or "default",
        "seed": config.seed,
        "samples_sha256": hashlib.sha256(samples.read_bytes()).hexdigest(),
        "splits": splits,
    }


def _print_summary(config: PackConfig, records: list[Record], num_rejected: int) -> None:
    index = read_index(config.out)
    print(table(class_by_split(index.counts()), ("class", *SPLITS, "all", "patients")))
    print(f"images of {len({record.patient for record in records})} patients, none in two splits")
    unmatched = count_unmatched(records)
    if unmatched:
        print(
            f"{unmatched} of {len(records)} images have no known patient and count as a patient "
            "each (--patient-pattern or a csv column `patient` tells them)"
        )
    if num_rejected:
        print(f"{num_rejected} unreadable images are listed in {config.out / 'rejected.csv'}")
    print(f"packed {len(records)} images into {config.out}")


def class_by_split(counts: dict[str, dict[str, dict[str, int]]]) -> list[list[str]]:
    """Rows of the class x split table: images, with the patients of the class at the end.

    Args:
        counts: images and patients by split and class, as `Index.counts` gives.
    """
    rows = []
    for name in counts[SPLITS[0]]:
        images = [counts[split][name]["images"] for split in SPLITS]
        patients = sum(counts[split][name]["patients"] for split in SPLITS)
        rows.append([name, *map(str, images), str(sum(images)), str(patients)])
    totals = [sum(int(row[column]) for row in rows) for column in range(1, 5)]
    return [*rows, ["all", *map(str, totals), ""]]
