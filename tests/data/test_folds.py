from dataclasses import replace

import pytest
from support import make_shards

from cxrdist.data.folds import cut_fold, read_fold
from cxrdist.data.index import read_index
from cxrdist.errors import CxrdistError


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """The index of 60 images of 30 patients in two classes, one of them rare."""
    return read_index(make_shards(tmp_path_factory.mktemp("folds"), {"a": 44, "b": 16}))


def test_folds_part_train_and_val_and_leave_test_alone(index):
    """Each image of train and val is validated in one of five folds; no patient is in two parts."""
    development = set(index.numbers("train") + index.numbers("val"))
    held_out = []
    for number in range(1, 6):
        cut = cut_fold(index, f"{number}/5")
        train, val = cut.numbers("train"), cut.numbers("val")
        held_out += val
        assert set(train) | set(val) == development
        assert cut.numbers("test") == index.numbers("test")
        patients = [{cut.samples[i].patient for i in numbers} for numbers in (train, val)]
        assert not patients[0] & patients[1]
        assert (cut.sha256, len(cut.samples)) == (index.sha256, len(index.samples))
        assert cut.split.endswith(f"fold {number}/5 by patient")
    assert sorted(held_out) == sorted(development)


def test_each_fold_has_each_class(index):
    """Of 16 images of the rare class, two a patient, each of three folds validates some."""
    for number in range(1, 4):
        cut = cut_fold(index, f"{number}/3")
        for split in ("train", "val"):
            assert {cut.samples[i].label for i in cut.numbers(split)} == {"a", "b"}


def test_labels_without_enough_images_are_no_stratum(index, recwarn):
    """Several labels an image, one of them once: folds are cut without a word of warning."""
    labels = ["", "a", "b", "a|b"]
    samples = [s._replace(label=labels[i % 4]) for i, s in enumerate(index.samples)]
    first = index.numbers("train")[0]
    samples[first] = samples[first]._replace(label="c")
    several = replace(index, task="multilabel", classes=["a", "b", "c"], samples=samples)
    sizes = [len(cut_fold(several, f"{number}/3").numbers("val")) for number in (1, 2, 3)]
    assert sum(sizes) == len(several.numbers("train") + several.numbers("val"))
    assert max(sizes) - min(sizes) <= 4
    assert not recwarn.list


def test_without_a_fold_nothing_changes(index):
    """The splits are those of the shards."""
    assert cut_fold(index, None) is index


@pytest.mark.parametrize("text", ["0/5", "6/5", "1/1", "1/21", "2 of 5", "", "-1/5"])
def test_what_is_no_fold_is_refused(text):
    """One line names the field and what it takes."""
    with pytest.raises(CxrdistError, match=r"fold: is .*, expected NUMBER/COUNT such as 2/5"):
        read_fold(text)


def test_more_folds_than_patients_are_refused(index):
    """Three patients cannot be in four folds."""
    few = sorted({index.samples[i].patient for i in index.numbers("train")})[:3]
    samples = [s if s.patient in few else s._replace(split="test") for s in index.samples]
    with pytest.raises(CxrdistError, match=r"fold: 4 folds need as many patients .* have 3; take"):
        cut_fold(replace(index, samples=samples), "1/4")
