"""Summary: what a pack prints about its shards."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from cxrdist.config import PackConfig
from cxrdist.data.index import Index
from cxrdist.data.labels import NOT_STATED
from cxrdist.data.records import (
    SPLITS,
    Record,
    Source,
    count_unmatched,
    differences,
)
from cxrdist.data.sources import ONLY_FOR
from cxrdist.data.views import LEFT_OUT, NAMES
from cxrdist.errors import RunFailedError
from cxrdist.info import LabelAmount
from cxrdist.terminal import table

Counts = dict[str, dict[str, LabelAmount]]  # by split and class
MOST_SOURCES = 10  # in a line
_PATIENT_HINT = " (give patients with --patient-pattern or a csv column `patient`)"


def print_summary(config: PackConfig, source: Source, records: list[Record], index: Index) -> None:
    """Print how many images and patients were packed, with notes and unexpected counts.

    Args:
        config: the options.
        source: what was read.
        records: the packed records.
        index: of the shards.
    """
    counts = index.counts()
    print(table(_class_by_split(index, counts), ("class", *SPLITS, "all", "patients")))
    print(f"images of {len({record.patient for record in records})} patients, none in two splits")
    _print_labels(index, counts)
    for line in _tell_origins(index):
        print(line)
    unmatched = count_unmatched(records)
    if unmatched:
        print(
            f"{unmatched} of {len(records)} images have no known patient; each counts as a patient "
            f"of its own{_PATIENT_HINT if config.source in ONLY_FOR['patient_pattern'] else ''}"
        )
    if cover := index.cover:
        print(
            f"burned-in text: {cover['boxes']} boxes in {cover['images']} images are covered "
            f"({config.cover}, {config.cover_split})"
        )
    for line in source.notes:
        print(f"{source.name}: {line}")
    for line in differences(source, config.expect):
        print(f"unexpected count in {source.name}: {line}")


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
    yield f"views: {_listed((NAMES.get(view, view), n) for view, n in views.most_common())}"
    sources = Counter(sample.source for sample in index.samples)
    if len(sources) > 1:
        listed = _listed(sources.most_common(MOST_SOURCES))
        more = len(sources) - MOST_SOURCES
        yield f"sources: {listed}{f' and {more} more' if more > 0 else ''}"


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts)


def count_fates(
    source: Source, num_packed: int, rejected: Sequence[str], num_copies: int
) -> list[tuple[str, str]]:
    """Return the rows of the table that accounts for all files, most frequent reasons first.

    Args:
        source: what was read.
        num_packed: images in the shards.
        rejected: reasons of records that were left out after their files were read.
        num_copies: records that were dropped as copies.

    Raises:
        RunFailedError: the numbers do not add up, so a file was lost.
    """
    reasons = Counter(left.reason for left in source.left_out)
    views = LEFT_OUT.values()
    reasons += Counter(reason if reason in views else "unreadable" for reason in rejected)
    reasons += Counter({"copy, in dropped.csv": num_copies})
    if source.num_found != num_packed + reasons.total():
        raise RunFailedError(
            f"{source.num_found} files were found, but {num_packed} are packed and "
            f"{reasons.total()} left out; this is a bug in cxrdist, please report it"
        )
    left_out = [(f"left out: {reason}", str(number)) for reason, number in reasons.most_common()]
    return [("found", str(source.num_found)), ("packed", str(num_packed)), *left_out]


def _class_by_split(index: Index, counts: Counts) -> list[list[str]]:
    """Return the rows of the class x split table: images, then the patients of the class."""
    rows = []
    for name in index.classes:
        images = [counts[split][name]["images"] for split in SPLITS]
        patients = sum(counts[split][name]["patients"] for split in SPLITS)
        rows.append([name, *map(str, images), str(sum(images)), str(patients)])
    held = Counter(sample.split for sample in index.samples)
    totals = [*(held[split] for split in SPLITS), len(index.samples)]
    return [*rows, ["all", *map(str, totals), str(len({s.patient for s in index.samples}))]]
