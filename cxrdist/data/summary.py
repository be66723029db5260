"""Summary: what a pack prints of the shards that it made."""

from collections import Counter

from cxrdist.config import PackConfig
from cxrdist.data.index import Index
from cxrdist.data.records import (
    SPLITS,
    Record,
    Source,
    count_unmatched,
    differences,
)
from cxrdist.errors import RunFailedError
from cxrdist.terminal import table


def print_summary(config: PackConfig, source: Source, records: list[Record], index: Index) -> None:
    """Print how many images and patients were packed, and what is to be known of them.

    Args:
        config: the options.
        source: what was read.
        records: those that are packed.
        index: of the shards.
    """
    print(table(class_by_split(index), ("class", *SPLITS, "all", "patients")))
    print(f"images of {len({record.patient for record in records})} patients, none in two splits")
    unmatched = count_unmatched(records)
    if unmatched:
        print(
            f"{unmatched} of {len(records)} images have no known patient and count as a patient "
            "each (--patient-pattern or a csv column `patient` tells them)"
        )
    if cover := index.cover:
        print(
            f"burned-in text: {cover['boxes']} boxes in {cover['images']} images are covered "
            f"({config.cover}, {config.cover_split})"
        )
    for line in source.notes:
        print(f"{source.name}: {line}")
    for line in differences(source, config.expect):
        print(f"not as expected of {source.name}: {line}")


def count_fates(
    source: Source, num_packed: int, num_unreadable: int, num_copies: int
) -> list[tuple[str, str]]:
    """Rows of the table of what became of all that was found, the most frequent reasons first.

    Raises:
        RunFailedError: the numbers do not add up, so something was lost on the way.
    """
    reasons = Counter(left.reason for left in source.left_out)
    reasons += Counter({"unreadable": num_unreadable, "copy, in dropped.csv": num_copies})
    if source.num_found != num_packed + reasons.total():
        raise RunFailedError(
            f"{source.num_found} files were found, but {num_packed} are packed and "
            f"{reasons.total()} left out; this is a fault of cxrdist, please report it"
        )
    left_out = [(f"left out: {reason}", str(number)) for reason, number in reasons.most_common()]
    return [("found", str(source.num_found)), ("packed", str(num_packed)), *left_out]


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
