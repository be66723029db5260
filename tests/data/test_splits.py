from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cxrdist.data.records import Record, Source
from cxrdist.data.splits import assign_splits, describe_split, group_by_patient, split_notes
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


@pytest.mark.parametrize(
    "split",
    ["0.5/0.5", "0.5/0.2/0.2", "0/0/0", "half", "0.8/0.3/-0.1", "nan/nan/nan", "inf/0/0", "", "1"],
)
def test_bad_fractions_are_refused(split):
    """Fractions that are not three shares of a whole are refused."""
    with pytest.raises(CxrdistError, match="--split"):
        assign_splits(source_of(records_of({"a": 10, "b": 10})), split, 0)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("split", ["0.7/0.1/0.2", "0.9/0.1/0", "0.6/0/0.4", "0/0.5/0.5", "0/0/1"])
def test_random_sources_meet_their_targets_within_the_largest_patient(seed, split):
    """Each record is in one split asked for, no patient in two, each class near its share."""
    random = np.random.default_rng(seed)
    records = [
        Record(Path(), f"{label}{patient}_{i}", label, f"{label}{patient}", "s")
        for label, patients in zip("abc", random.integers(3, 40, 3), strict=True)
        for patient in range(patients)
        for i in range(random.geometric(random.uniform(0.2, 1)))
    ]
    random.shuffle(records)
    splits = assign_splits(source_of(records), split, seed)
    assert len(splits) == len(records)
    homes = {(r.patient, s) for r, s in zip(records, splits, strict=True)}
    assert len(homes) == len({r.patient for r in records})
    fractions = dict(zip(("train", "val", "test"), map(float, split.split("/")), strict=True))
    assert set(splits) == {name for name, part in fractions.items() if part}
    for label in "abc":
        own = Counter(s for r, s in zip(records, splits, strict=True) if r.label == label)
        largest = max(Counter(r.patient for r in records if r.label == label).values())
        for name, part in fractions.items():
            assert abs(own[name] - part * own.total()) <= largest + 1
            assert bool(own[name]) == bool(part)


def test_a_fraction_of_zero_leaves_a_split_empty():
    """All of 0/0/1 is test, and nothing of 0.5/0.5/0 is."""
    source = source_of(records_of({"a": 10, "b": 10}))
    assert set(assign_splits(source, "0/0/1", 0)) == {"test"}
    assert Counter(assign_splits(source, "0.5/0.5/0", 0)) == {"train": 10, "val": 10}


def test_a_small_class_is_in_each_split():
    """Of 4 images 0.4 would be in val; it gets one of them, and the others keep one."""
    records = records_of({"a": 10, "b": 4, "c": 4, "d": 3})
    splits = assign_splits(source_of(records), None, 0)
    counts = Counter((r.label, s) for r, s in zip(records, splits, strict=True))
    assert [counts["a", s] for s in ("train", "val", "test")] == [7, 1, 2]
    for label, train in (("b", 2), ("c", 2), ("d", 1)):
        assert [counts[label, s] for s in ("train", "val", "test")] == [train, 1, 1]


def test_the_papers_smallest_class_has_all_its_splits():
    """Of 62 images 60 are for test, as in the paper, and one each for train and val."""
    records = records_of({"a": 62, "b": 100})
    splits = assign_splits(source_of(records), "paper", 0)
    counts = Counter((r.label, s) for r, s in zip(records, splits, strict=True))
    assert [counts["a", s] for s in ("train", "val", "test")] == [1, 1, 60]


def test_a_split_takes_one_patient_more_if_that_is_nearer_to_its_target():
    """Of 9 patients with 4 images a fifth is 7 images: 8 are nearer than 4."""
    source = source_of(records_of({"a": 36, "b": 36}, images_per_patient=4))
    counts = Counter(assign_splits(source, None, 0))
    assert counts == {"train": 48, "val": 8, "test": 16}


def test_rare_labels_are_in_each_split():
    """Of many labels an image each one that three patients have is in train, val and test."""
    random = np.random.default_rng(0)
    labels = [[x for x in "abcd" if random.random() < 0.3] for _ in range(300)]
    labels = [[*row, "rare"] if i in (7, 80, 201) else row for i, row in enumerate(labels)]
    records = [
        Record(Path(), str(i), "|".join(row), str(i // 2), "s") for i, row in enumerate(labels)
    ]
    source = Source(records, "multilabel", ["a", "b", "c", "d", "rare"], "s")
    splits = assign_splits(source, None, 0)
    assert {s for r, s in zip(records, splits, strict=True) if "rare" in r.label} == {
        "train",
        "val",
        "test",
    }
    assert abs(splits.count("val") - 30) <= 0.02 * len(records)
    assert abs(splits.count("test") - 60) <= 0.02 * len(records)


@pytest.mark.parametrize("patients", [("ANON",), ("ANON", "one", "two", "three")])
def test_one_patient_for_most_images_is_named_and_its_value_is_not(patients):
    """A placeholder in place of patients is refused with the count and the mend."""
    records = [
        Record(
            Path(), str(i), "ab"[i % 2], patients[i % 40 % len(patients)] if i < 12 else "ANON", "s"
        )
        for i in range(60)
    ]
    of_one = sum(r.patient == "ANON" for r in records)
    with pytest.raises(
        CxrdistError, match=f"{of_one} of 60 images have the same patient ID"
    ) as caught:
        assign_splits(source_of(records), None, 0)
    assert "ANON " not in str(caught.value).replace("ANONYMIZED", "")
    assert "--patient-pattern" in str(caught.value)
    assert set(assign_splits(source_of(records), "0/0/1", 0)) == {"test"}
    given = [replace(r, split=("train", "test")[i % 3 == 0]) for i, r in enumerate(records)]
    with pytest.raises(CxrdistError, match="have the same patient ID"):
        assign_splits(source_of(given), None, 0)


def test_one_patient_for_many_images_is_told():
    """A third of all images is no reason to refuse and one to look."""
    records = [
        Record(Path(), str(i), "ab"[i % 2], "0" if i % 3 == 0 else str(i), "s") for i in range(90)
    ]
    source = source_of(records)
    groups = group_by_patient(records)
    (told,) = split_notes(source, None, groups, assign_splits(source, None, 0))
    assert told.startswith("one patient ID has 30 of 90 images; ")


def test_copies_that_join_most_images_are_named():
    """Where not a patient but equal images tie everything together, --duplicates is named."""
    with pytest.raises(
        CxrdistError,
        match=r"25 of 40 images belong to patients that are joined by equal images; see --dup",
    ):
        assign_splits(
            source_of(records_of({"a": 20, "b": 20})), None, 0, [0] * 25 + [*range(1, 16)]
        )


def test_given_splits_need_only_what_they_have():
    """All test, or no val, is as good as all three; a class must be in each of them."""
    records = [Record(Path(), str(i), "ab"[i % 2], str(i), "s", "test") for i in range(8)]
    source = source_of(records)
    assert set(assign_splits(source, None, 0)) == {"test"}
    assert describe_split(source, None) == "given by the source, test only"
    mixed = [replace(r, split="train") if i < 4 else r for i, r in enumerate(records)]
    assert set(assign_splits(source_of(mixed), None, 0)) == {"train", "test"}
    mixed[5] = replace(mixed[5], label="a")
    mixed[7] = replace(mixed[7], label="a")
    with pytest.raises(CxrdistError, match="class 'b' has no image in test"):
        assign_splits(source_of(mixed), None, 0)


def mixed_records() -> list[Record]:
    """60 with official test and development lists, and 200 of 100 patients without a split."""
    given = [
        Record(
            Path(), f"nih/{i}", "ab"[i % 2], f"nih:{i}", "nih", "test" if i < 20 else "train+val"
        )
        for i in range(60)
    ]
    return given + [replace(r, path=f"x/{r.path}") for r in records_of({"a": 100, "b": 100}, 2)]


@pytest.mark.parametrize("seed", range(3))
def test_of_several_sources_only_those_without_splits_are_drawn(seed):
    """Official lists stay, val is drawn of what they leave open, the others by the fractions."""
    records = mixed_records()
    source = source_of(records)
    splits = assign_splits(source, "0.6/0.2/0.2", seed)
    official = Counter(zip([r.split for r in records[:60]], splits[:60], strict=True))
    assert official == {("test", "test"): 20, ("train+val", "train"): 30, ("train+val", "val"): 10}
    assert Counter(splits[60:]) == {"train": 120, "val": 40, "test": 40}
    homes = {(r.patient, name) for r, name in zip(records, splits, strict=True)}
    assert len(homes) == len({r.patient for r in records})
    assert describe_split(source, "0.6/0.2/0.2") == (
        "given by the source for 60 images, drawn for 200 (0.6/0.2/0.2), val drawn (0.6/0.2/0.2)"
    )
    assert split_notes(source, "0.6/0.2/0.2", group_by_patient(records), splits) == []
    alone = source_of(records[60:])
    assert Counter(assign_splits(alone, "0.6/0.2/0.2", seed)) == Counter(splits[60:])


def test_a_copy_of_an_image_with_an_official_split_follows_it():
    """Image 60 is also an official test image, 62 an official training image, 64 is both."""
    records = mixed_records()
    groups = group_by_patient(records)
    development = next(i for i in range(20, 60))
    for copy, of in ((60, 0), (62, development), (64, 1)):
        old = groups[copy]
        groups = [groups[of] if group == old else group for group in groups]
    splits = assign_splits(source_of(records), None, 0, groups)
    assert splits[60] == splits[61] == "test"
    assert splits[62] == splits[63] == splits[development] != "test"
    groups = [groups[1] if group == groups[30] else group for group in groups]
    splits = assign_splits(source_of(records), None, 0, groups)
    assert (splits[1], splits[30], splits[64]) == ("test", "train", "test")


def test_a_copy_of_a_given_val_image_is_not_drawn_for_train():
    """Its own source leaves open whether it is in train or val."""
    names = ["train", "val", "test"] * 2 + ["train+val"] * 8
    records = [
        Record(Path(), str(i), "ab"[i % 2], str(i), "s", name) for i, name in enumerate(names)
    ]
    groups = list(range(len(records)))
    groups[6], groups[7], groups[8] = 0, 1, 2
    splits = assign_splits(source_of(records), None, 0, groups)
    assert splits[6:9] == ["train", "val", "train"]


def test_a_placeholder_among_the_patients_to_be_drawn_is_refused():
    """The official lists may be much larger: the part that is drawn counts."""
    records = [
        replace(r, patient="UNKNOWN") if r.split is None and i % 3 else r
        for i, r in enumerate(mixed_records())
    ]
    with pytest.raises(CxrdistError, match="of 200 images have the same patient ID"):
        assign_splits(source_of(records), None, 0)


def test_val_is_drawn_of_what_is_given_for_train_and_val_together():
    """By the ratio of the two fractions; 0 for val leaves it empty, 0 for both is refused."""
    records = [
        Record(Path(), str(i), "ab"[i % 2], str(i), "s", "test" if i < 20 else "train+val")
        for i in range(100)
    ]
    source = source_of(records)
    assert Counter(assign_splits(source, None, 0)) == {"train": 70, "val": 10, "test": 20}
    assert split_notes(source, "0.7/0.1/0.2", [], []) == []
    assert split_notes(source, "paper", [], []) == [
        "--split paper is not used, since the source gives the splits"
    ]
    assert describe_split(source, "paper") == "given by the source, val drawn (0.7/0.1/0.2)"
    assert Counter(assign_splits(source, "0.5/0/0.5", 0)) == {"train": 80, "test": 20}
    assert describe_split(source, "0.5/0/0.5") == "given by the source, train and test only"
    with pytest.raises(CxrdistError, match="--split 0/0/1: leaves no split"):
        assign_splits(source, "0/0/1", 0)


def test_a_split_that_large_patients_keep_from_its_target_is_told():
    """Eight patients of 10 images cannot give a tenth; patients of one image meet it in silence."""
    source = source_of(records_of({"a": 40, "b": 40}, images_per_patient=10))
    groups = group_by_patient(source.records)
    splits = assign_splits(source, "0.8/0.1/0.1", 0)
    told = split_notes(source, "0.8/0.1/0.1", groups, splits)
    assert told[0].startswith("train has 50% of the images instead of 80%, since ")
    assert "up to 10 images" in told[0]
    source = source_of(records_of({"a": 40, "b": 40}))
    splits = assign_splits(source, "0.8/0.1/0.1", 0)
    assert split_notes(source, "0.8/0.1/0.1", [*range(80)], splits) == []


@pytest.mark.parametrize(
    ("train", "images", "told"),
    [(6, 8, False), (7, 8, True), (520, 1000, False), (540, 1000, True)],
)
def test_a_split_may_miss_its_target_by_an_image_per_class_or_by_three_percent(train, images, told):
    """Half of the images are asked for; 2 of 8 are no more than the rounding of two classes."""
    source = source_of(records_of({"a": images // 2, "b": images // 2}))
    splits = ["train"] * train + ["test"] * (images - train)
    notes = split_notes(source, "0.5/0/0.5", [*range(images)], splits)
    assert [note.split(" of ")[0] for note in notes] == told * [
        f"train has {train / images:.0%}",
        f"test has {1 - train / images:.0%}",
    ]


@pytest.mark.parametrize(
    ("own", "images", "told"),
    [(20, 100, False), (21, 100, True), (30, 300, False), (31, 300, True)],
)
def test_a_patient_may_have_twenty_images_or_a_tenth(own, images, told):
    """One with more looks like a placeholder."""
    records = [
        replace(record, patient="0" if i < own else record.patient)
        for i, record in enumerate(records_of({"a": images // 2, "b": images // 2}))
    ]
    source = source_of(records)
    splits = assign_splits(source, "1/0/0", 0)
    assert split_notes(source, "1/0/0", group_by_patient(records), splits) == told * [
        f"one patient ID has {own} of {images} images; if it is a placeholder, give the patients "
        "with --patient-pattern or a csv column patient"
    ]


def test_too_small_a_class_is_refused():
    """The paper's split needs more than 60 images of each class; a split needs each class."""
    with pytest.raises(CxrdistError, match="class 'b' has 40"):
        assign_splits(source_of(records_of({"a": 100, "b": 40})), "paper", 0)
    with pytest.raises(CxrdistError, match="class 'b' has no image in val"):
        assign_splits(source_of(records_of({"a": 100, "b": 2})), "0.8/0.1/0.1", 0)


def test_a_given_split_that_shares_a_patient_is_refused():
    """A table that puts a patient into train and test is refused with both paths."""
    records = [
        Record(Path("1"), "1", "a", "p", "s", "train"),
        Record(Path("2"), "2", "a", "p", "s", "test"),
    ]
    with pytest.raises(CxrdistError, match="patient p: 1 is in train, 2 in test"):
        assign_splits(source_of(records), "paper", 0)
