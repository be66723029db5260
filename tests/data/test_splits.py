from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cxrdist.data.records import Record, Source
from cxrdist.data.splits import assign_splits
from cxrdist.errors import CxrdistError


def source_of(records: list[Record]) -> Source:
    """A source of one label an image."""
    return Source(records, "multiclass", sorted({r.label for r in records}), "s")


def records_of(counts: dict[str, int], images_per_patient: int = 1) -> list[Record]:
    """Records without files."""
    return [
        Record(Path(), f"{name}/{i}", name, f"{name}{i // images_per_patient}", "s")
        for name, count in counts.items()
        for i in range(count)
    ]


def test_the_papers_split_has_the_papers_counts():
    """219/1341/1345 images give 60 test images of each class and 127 COVID-19 for training."""
    records = records_of({"COVID-19": 219, "NORMAL": 1341, "Viral Pneumonia": 1345})
    splits = assign_splits(source_of(records), "paper", seed=0)
    counts = Counter((r.label, s) for r, s in zip(records, splits, strict=True))
    assert [counts[name, "test"] for name in ("COVID-19", "NORMAL", "Viral Pneumonia")] == [60] * 3
    assert counts["COVID-19", "train"] == 127
    assert counts["COVID-19", "val"] == 32
    assert counts["NORMAL", "val"] == round(0.2 * 1281)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("split", ["paper", "0.6/0.2/0.2"])
def test_no_patient_is_in_two_splits(seed, split):
    """Patients of several images, some of them in two classes, stay whole; sizes are near."""
    random = np.random.default_rng(seed)
    records = []
    for patient in range(400):
        for i in range(random.integers(1, 6)):
            label = "ab"[(patient % 2) ^ (random.random() < 0.05)]
            records.append(Record(Path(), f"{patient}_{i}", label, str(patient), "s"))
    splits = assign_splits(source_of(records), split, seed)
    home = {}
    for record, name in zip(records, splits, strict=True):
        assert home.setdefault(record.patient, name) == name
    counts = Counter((r.label, s) for r, s in zip(records, splits, strict=True))
    for label in "ab":
        total = sum(counts[label, s] for s in ("train", "val", "test"))
        expected = 60 if split == "paper" else 0.2 * total
        assert abs(counts[label, "test"] - expected) <= 5


def test_the_split_depends_on_the_seed_alone():
    """The same seed gives the same split, another seed another."""
    records = records_of({"a": 100, "b": 100}, images_per_patient=2)
    first = assign_splits(source_of(records), "0.6/0.2/0.2", 1)
    assert first == assign_splits(source_of(records), "0.6/0.2/0.2", 1)
    assert first != assign_splits(source_of(records), "0.6/0.2/0.2", 2)


@pytest.mark.parametrize("split", ["0.5/0.5", "0.5/0.2/0.2", "1/0/0", "half", "0.8/0.3/-0.1"])
def test_bad_fractions_are_refused(split):
    """Fractions that are not three shares of a whole are refused."""
    with pytest.raises(CxrdistError, match="--split"):
        assign_splits(source_of(records_of({"a": 10, "b": 10})), split, 0)


def test_too_small_a_class_is_refused():
    """The paper's split needs more than 60 images of each class; a split needs each class."""
    with pytest.raises(CxrdistError, match="class 'b' has 40"):
        assign_splits(source_of(records_of({"a": 100, "b": 40})), "paper", 0)
    with pytest.raises(CxrdistError, match="class 'b' has no image in val"):
        assign_splits(source_of(records_of({"a": 100, "b": 2})), "0.8/0.1/0.1", 0)


def test_a_given_split_that_shares_a_patient_is_refused():
    """A table that puts a patient into train and test is refused with both paths."""
    records = [
        Record(Path(), "1", "a", "p", "s", "train"),
        Record(Path(), "2", "a", "p", "s", "test"),
    ]
    with pytest.raises(CxrdistError, match="patient p: 1 is in train, 2 in test"):
        assign_splits(source_of(records), "paper", 0)
