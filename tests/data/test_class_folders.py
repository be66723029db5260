from pathlib import Path

import pytest
from PIL import Image
from support import make_images

from cxrdist.config import PackConfig
from cxrdist.data.class_folders import read_class_folders
from cxrdist.data.records import count_unmatched
from cxrdist.data.sources import read_source
from cxrdist.data.splits import assign_splits
from cxrdist.errors import CxrdistError


def touch(folder: Path, *paths: str) -> Path:
    """A folder with tiny images of these paths."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(folder / path)
    return folder


def test_class_folders_give_label_and_patient(tmp_path):
    """What is no image, or beside the class folders, is named with a reason."""
    folder = make_images(tmp_path / "in", {"x": 3, "y": 2})
    (folder / "x" / "notes.txt").write_text("no image")
    touch(folder, "stray.png")
    source = read_class_folders(folder, r"^(\w+)_")
    assert [(r.path, r.label, r.patient, r.split) for r in source.records] == [
        ("x/x000_0.png", "x", "x000", None),
        ("x/x000_1.png", "x", "x000", None),
        ("x/x001_0.png", "x", "x001", None),
        ("y/y000_0.png", "y", "y000", None),
        ("y/y000_1.png", "y", "y000", None),
    ]
    assert count_unmatched(source.records) == 0
    assert source.left_out == (
        ("x/notes.txt", "not an image"),
        ("stray.png", "beside the class folders"),
    )
    assert source.num_found == 7


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "VALID", "Testing")])
@pytest.mark.parametrize("order", ["{split}/{label}", "{label}/{split}"])
def test_folders_of_splits_above_or_below_the_classes_give_the_splits(tmp_path, names, order):
    """The layout of Kaggle sets: labels are the classes, and no image changes its split."""
    for split in names:
        for label in ("NORMAL", "PNEUMONIA"):
            path = order.format(split=split, label=label)
            touch(tmp_path, f"{path}/{label}{split}1.png", f"{path}/deeper/{label}{split}2.png")
    source = read_class_folders(tmp_path)
    assert source.classes == ["NORMAL", "PNEUMONIA"]
    given = dict(zip(names, ("train", "val", "test"), strict=True))
    splits = assign_splits(source, None, seed=0)
    for record, split in zip(source.records, splits, strict=True):
        assert given[next(name for name in names if name in record.path)] == split
        assert record.label in record.path


def test_without_val_it_is_drawn_from_train(tmp_path):
    """train/ and test/ alone: test stays as it is."""
    for label in ("a", "b"):
        touch(tmp_path, *(f"train/{label}/{i}.png" for i in range(16)))
        touch(tmp_path, *(f"test/{label}/{i}.png" for i in range(4)))
    source = read_class_folders(tmp_path)
    splits = assign_splits(source, None, seed=0)
    for record, split in zip(source.records, splits, strict=True):
        assert (split == "test") == record.path.startswith("test/")
    assert splits.count("val") == 4


def test_a_patient_in_two_given_splits_is_refused(tmp_path):
    """As everywhere else."""
    for split in ("train", "val", "test"):
        touch(tmp_path, f"{split}/a/{split}_1.png", f"{split}/b/{split}_2.png")
    touch(tmp_path, "test/a/train_9.png")
    source = read_class_folders(tmp_path, r"^(\w+)_")
    with pytest.raises(CxrdistError, match="patient train: "):
        assign_splits(source, None, seed=0)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("train/a/1.png", "test/a/1.png", "more/a/1.png"), r"splits \(test, train\) and others"),
        (("a/train/1.png", "a/test/1.png", "b/1.png"), r"splits \(test, train\) and others"),
        (("a/train/1.png", "a/2.png", "b/train/1.png"), "and others .images"),
        (("train/test/1.png", "test/b/1.png"), r"splits \(test, train\) and others \(test"),
        (("val/a/1.png", "dev/b/1.png"), "the folders dev and val are both val"),
        (("train_images/a/1.png", "test_images/a/1.png"), "look like splits"),
        (("fold_1/a/1.png", "fold_2/b/1.png"), "fold_1, fold_2 are named like parts of a set"),
        (("images_001/1.png", "images_002/1.png"), "images_001, images_002 are named like parts"),
        (("COVID/images/1.png", "COVID/masks/1.png"), "the folder masks has masks, which are no"),
        (("a/1.png", "b/1.png", "Mask/1.png"), "the folder Mask has masks, which are no X-rays"),
        (("a/1.png", "all/1.png"), "class .all.: the results call all classes together so"),
        (("a/1.png", "A/1.png"), "'A' and 'a' are two spellings of one name"),
        (("set/a/1.png", "set/b/1.png"), r"found 1 class \(set\)"),
        (("1.png", "2.png"), "2 images, none of them in the folder of a class; expected one"),
    ],
)
def test_unclear_layouts_are_refused(tmp_path, paths, message):
    """Splits never become classes, and classes never splits, in silence."""
    with pytest.raises(CxrdistError, match=message):
        read_source(PackConfig("folder", touch(tmp_path, *paths), Path("out")))


def test_classes_that_are_named_like_a_split_or_a_number_are_read(tmp_path):
    """One split as the first word, grades as numbers, and one name that is like a part of a set."""
    for names in (["test negative", "test positive"], ["0", "1"], ["fold 1", "tumour"]):
        folder = touch(tmp_path / names[0], *(f"{name}/1.png" for name in names))
        assert read_class_folders(folder).classes == names


def test_a_class_without_images_says_what_it_has(tmp_path):
    """The first file that was left out tells why."""
    touch(tmp_path, "a/1.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.mp4").write_bytes(b"film")
    with pytest.raises(CxrdistError, match=r"b: the class has no image \(b/1.mp4: not an image\)"):
        read_class_folders(tmp_path)


def test_a_folder_that_is_skipped_is_no_class_and_hides_none(tmp_path):
    """The masks beside the classes are not packed; a class without images is refused as ever."""
    masks = tmp_path / "masks"
    touch(tmp_path, "a/1.png", "masks/1.png")
    assert read_class_folders(tmp_path, besides=[masks]).classes == ["a"]
    (tmp_path / "b").mkdir()
    with pytest.raises(CxrdistError, match="b: the class has no image"):
        read_class_folders(tmp_path, besides=[masks])


def test_names_that_tell_no_patient_are_patients_of_their_own(tmp_path):
    """Where the pattern does not match, images are not thrown together, and are counted."""
    folder = make_images(tmp_path / "in", {"x": 2, "y": 2})
    records = read_class_folders(folder, r"^(x\d+)_").records
    assert len({r.patient for r in records if r.label == "y"}) == 2
    assert count_unmatched(records) == 2


def test_the_first_group_that_matches_is_the_patient(tmp_path):
    """One pattern can hold one way to name patients for each class."""
    folder = make_images(tmp_path / "in", {"x": 1, "y": 1})
    records = read_class_folders(folder, r"^(x\d+)_|^(y\d)").records
    assert [r.patient for r in records] == ["x000", "y0"]


@pytest.mark.parametrize("pattern", ["(", r"^\d+_"])
def test_a_pattern_without_a_patient_is_refused(tmp_path, pattern):
    """A pattern that cannot tell a patient is an error, not a data set without patients."""
    with pytest.raises(CxrdistError, match="--patient-pattern"):
        read_class_folders(tmp_path, pattern)
