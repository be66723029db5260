import csv
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from dicoms import write_dicom
from PIL import Image

from cxrdist.config import PackConfig
from cxrdist.data.chestxray14 import LABELS as CHESTXRAY14
from cxrdist.data.findings import Finding
from cxrdist.data.index import read_index
from cxrdist.data.labels import labels_of
from cxrdist.data.pack import pack
from cxrdist.data.sources import read_source
from cxrdist.errors import CxrdistError

MAP = Path(__file__).parents[2] / "shards/labels/vindr-cxr-to-chestxray14.yaml"
# Columns of the tables of labels; that of test images has no reader and another last but one.
LABELS = (
    "Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Clavicle fracture,Consolidation,"
    "Edema,Emphysema,Enlarged PA,ILD,Infiltration,Lung Opacity,Lung cavity,Lung cyst,"
    "Mediastinal shift,Nodule/Mass,Pleural effusion,Pleural thickening,Pneumothorax,"
    "Pulmonary fibrosis,Rib fracture,Other lesion,COPD,Lung tumor,Pneumonia,Tuberculosis,"
    "Other diseases,No finding"
).split(",")
BOXES = ("image_id", "rad_id", "class_name", "x_min", "y_min", "x_max", "y_max")
KAGGLE = ("image_id", "class_name", "class_id", "rad_id", "x_min", "y_min", "x_max", "y_max")
KAGGLE_LABELS = (  # class_id 0 to 14
    "Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Consolidation,ILD,Infiltration,"
    "Lung Opacity,Nodule/Mass,Other lesion,Pleural effusion,Pleural thickening,Pneumothorax,"
    "Pulmonary fibrosis,No finding"
).split(",")
# Of the authors' de-identified files only these tags are left, beside those of the pixels.
TAGS = {
    **{"PatientSex": "F", "PatientAge": "052Y", "PatientID": None, "PatientName": None},
    **{"PatientBirthDate": None, "ViewPosition": None, "Modality": None},
    **{"SOPClassUID": None, "SOPInstanceUID": None},
}
Stated = Sequence[tuple[str, str, Sequence[str]]]
"""Image, reader, and the labels that the reader states."""


def image_name(number: int) -> str:
    return f"{number:032x}"


def write_csv(file: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as table:
        csv.writer(table).writerows([header, *rows])


def write_labels(folder: Path, split: str, stated: Stated) -> None:
    """Write image_labels_SPLIT.csv; test images have a row each and no reader."""
    rows = []
    for image, reader, labels in stated:
        names = [image] if split == "test" else [image, reader]
        rows.append([*names, *(int(name in labels) for name in LABELS)])
    first = ["image_id"] if split == "test" else ["image_id", "rad_id"]
    last = ["Other disease", "No finding"] if split == "test" else LABELS[-2:]
    write_csv(folder / f"image_labels_{split}.csv", [*first, *LABELS[:-2], *last], rows)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def read(folder: Path):
    return read_source(PackConfig("vindr-cxr", folder, Path("out")))


def write_physionet(folder: Path) -> Path:
    """Two training images read by three, a test image with a consensus, and their boxes."""
    none, finding = "No finding", "Nodule/Mass"
    train = [
        *[("a", f"R{n}", labels) for n, labels in ((8, [none]), (9, [none]), (10, [none]))],
        ("b", "R8", [finding, "Pneumonia", "ILD"]),
        ("b", "R9", [finding, "Lung Opacity", "ILD"]),
        ("b", "R10", ["ILD"]),
    ]
    write_labels(folder / "annotations", "train", train)
    write_labels(folder / "annotations", "test", [("c", "", ["Other diseases", "Edema"])])
    boxes = [
        *[("a", reader, none, "", "", "", "") for reader in ("R8", "R9", "R10")],
        ("b", "R9", "Lung Opacity", 1.5, 2, 11.5, 30),
        ("b", "R8", finding, 10, 20, 30, 60),
    ]
    write_csv(folder / "annotations" / "annotations_train.csv", BOXES, boxes)
    header = [name for name in BOXES if name != "rad_id"]
    write_csv(folder / "annotations" / "annotations_test.csv", header, [("c", "Edema", 0, 0, 5, 7)])
    touch(folder, "train/a.dicom", "train/b.dicom", "test/c.dicom")
    return folder


def test_the_readers_of_a_training_image_vote(tmp_path):
    """Two of three make a label, one of three an uncertain one; test images have a consensus."""
    source = read(write_physionet(tmp_path))
    assert source.task == "multilabel"
    assert source.classes == LABELS
    assert len(LABELS) == 28
    known = {record.path: (record.label, record.uncertain) for record in source.records}
    assert known == {
        "train/a.dicom": ("No finding", ""),
        "train/b.dicom": ("ILD|Nodule/Mass", "Lung Opacity|Pneumonia"),
        "test/c.dicom": ("Edema|Other diseases", ""),
    }
    assert {record.missing for record in source.records} == {""}
    assert any(note.startswith("1 images have uncertain labels") for note in source.notes)


def test_the_boxes_of_all_readers_are_kept_with_their_reader(tmp_path):
    """Left and upper edge, width and height; rows without a box give none."""
    findings = {record.path: record.findings for record in read(write_physionet(tmp_path)).records}
    assert findings == {
        "train/a.dicom": (),
        "train/b.dicom": (
            Finding("Lung Opacity", 1.5, 2, 10, 28, "R9"),
            Finding("Nodule/Mass", 10, 20, 20, 40, "R8"),
        ),
        "test/c.dicom": (Finding("Edema", 0, 0, 5, 7),),
    }


def test_splits_are_official_and_patients_unknown(tmp_path):
    """Val is to be drawn from train; each image is a patient of its own, which is told."""
    source = read(write_physionet(tmp_path))
    assert {(record.path, record.split, record.patient) for record in source.records} == {
        ("train/a.dicom", "train+val", "image:train/a.dicom"),
        ("train/b.dicom", "train+val", "image:train/b.dicom"),
        ("test/c.dicom", "test", "image:test/c.dicom"),
    }
    assert {(record.view, record.source) for record in source.records} == {("PA", "VinDr-CXR")}
    assert any("no patient is known" in note for note in source.notes)
    assert source.dicom


def test_a_cell_that_a_reader_left_empty_is_no_vote(tmp_path):
    """One of two who have looked is uncertain, of three of whom none has the label is missing."""
    cells = {"R8": "1", "R9": "0", "R10": ""}
    rows = [["a", reader, *[cell] * 27, ""] for reader, cell in cells.items()]
    write_csv(tmp_path / "image_labels_train.csv", ["image_id", "rad_id", *LABELS], rows)
    touch(tmp_path, "train/a.png")
    record = read(tmp_path).records[0]
    assert (record.label, record.uncertain) == ("", "|".join(LABELS[:-1]))
    assert record.missing == "No finding"


def test_kaggle_s_table_of_boxes_gives_labels_too(tmp_path):
    """Each reader of an image has a row; the 15 classes of Kaggle, its test images have none."""
    rows = [
        *[("a", "No finding", 14, f"R{n}", "", "", "", "") for n in (1, 2, 3)],
        ("b", "Cardiomegaly", 3, "R8", "10", "20", "30", "40"),
        ("b", "Cardiomegaly", 3, "R9", "12", "20", "31", "40"),
        ("b", "Cardiomegaly", 3, "R9", "50", "50", "60", "60"),
        ("b", "ILD", 5, "R10", "1", "2", "3", "5"),
    ]
    write_csv(tmp_path / "train.csv", KAGGLE, rows)
    touch(tmp_path, "train/a.dicom", "train/b.dicom", "test/c.dicom", "sample_submission.csv")
    source = read(tmp_path)
    assert source.classes == KAGGLE_LABELS
    first, second = source.records
    assert (first.label, first.uncertain, first.findings) == ("No finding", "", ())
    assert (second.label, second.uncertain) == ("Cardiomegaly", "ILD")
    assert Counter(box.reader for box in second.findings) == {"R8": 1, "R9": 2, "R10": 1}
    assert ("test/c.dicom", "not in the table") in source.left_out
    assert source.num_found == len(source.records) + len(source.left_out) == 5
    assert any("Kaggle's release" in note for note in source.notes)


@pytest.mark.parametrize(
    ("size", "num_boxes"), [((40, 60), 1), ((29, 59), 1), ((28, 60), 0), ((30, 58), 0)]
)
def test_pictures_have_boxes_unless_these_reach_out_of_them(tmp_path, size, num_boxes):
    """Boxes are in px of the DICOM files, and of a smaller copy nothing tells the scale."""
    rows = [
        ("a", "Cardiomegaly", 3, "R8", "10", "20", "30", "60"),
        ("b", "Cardiomegaly", 3, "R8", "1", "2", "3", "4"),
    ]
    write_csv(tmp_path / "train.csv", KAGGLE, rows)
    (tmp_path / "train" / "train").mkdir(parents=True)
    for name in "ab":
        Image.new("L", size).save(tmp_path / "train" / "train" / f"{name}.png")
    source = read(tmp_path)
    assert [len(record.findings) for record in source.records] == [num_boxes] * 2
    told = [note for note in source.notes if "exceed them" in note]
    assert len(told) == 1 - num_boxes


def test_all_that_is_found_is_packed_or_left_out(tmp_path):
    """Rows without an image, images without a row, other folders, and tables that are missing."""
    folder = write_physionet(tmp_path)
    (folder / "train" / "a.dicom").unlink()
    (folder / "annotations" / "annotations_test.csv").unlink()
    touch(folder, "train/d.dicom", "more/e.dicom")
    source = read(folder)
    assert source.left_out == (
        ("annotations/annotations_train.csv", "not an image"),
        ("annotations/image_labels_test.csv", "not an image"),
        ("annotations/image_labels_train.csv", "not an image"),
        ("more/e.dicom", "outside of the data set's folders"),
        ("train/a", "in the table, but not here"),
        ("train/d.dicom", "not in the table"),
    )
    assert source.num_found == 8
    assert "without annotations_test.csv the test images have no boxes" in source.notes
    tables = "image_labels_train.csv and image_labels_test.csv"
    assert f"1 images of {tables} are not here" in source.notes


def test_the_test_images_alone_are_read(tmp_path):
    """Who evaluates needs no training images."""
    folder = write_physionet(tmp_path)
    for file in (folder / "annotations").glob("*_train.csv"):
        file.unlink()
    source = read(folder)
    assert [(record.path, record.split) for record in source.records] == [("test/c.dicom", "test")]


def test_the_label_map_gives_each_label_one_of_chestxray14_s_or_none():
    """All 28 are named; Hernia, and Nodule and Mass apart, are not in VinDr-CXR."""
    labels = yaml.safe_load(MAP.read_text())
    assert sorted(labels) == sorted(LABELS)
    named = {ours for ours in labels.values() if ours is not None}
    assert {*CHESTXRAY14} - named == {"Hernia", "Nodule", "Mass"}
    assert named <= {*CHESTXRAY14}


BOX = ("b", "R9", "Lung Opacity", 1, 2, 11, 30)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            (*BOX[:2], "Flu", *BOX[3:]),
            "annotations_train.csv row 2: 'Flu' is not one of the 28 labels",
        ),
        ((*BOX[:3], 11, 2, 1, 30), "row 2: the box '11, 2, 1, 30', expected x_min, y_min, x_max"),
        ((*BOX[:3], 1, 2, 1, 30), "row 2: the box '1, 2, 1, 30'"),
        ((*BOX[:3], 1, 2, 11, 2), "row 2: the box '1, 2, 11, 2'"),
        ((*BOX[:3], "", 2, 1, 30), "row 2: the box ', 2, 1, 30'"),
        ((*BOX[:3], "nan", 2, 1, 30), "row 2: the box 'nan, 2, 1, 30'"),
        ((*BOX[:3], -5, 2, 1, 30), "row 2: the box '-5, 2, 1, 30'"),
        ((*BOX[:3], 0, 2, "inf", 30), "row 2: the box '0, 2, inf, 30'"),
    ],
)
def test_a_malformed_box_is_refused_by_its_row(tmp_path, row, message):
    """Labels that there are not, and edges that bound nothing."""
    folder = write_physionet(tmp_path)
    write_csv(folder / "annotations" / "annotations_train.csv", BOXES, [row])
    with pytest.raises(CxrdistError, match=message):
        read(folder)


def test_malformed_tables_of_labels_are_refused(tmp_path):
    """No table, a column or a cell that is wrong, and a reader with two rows."""
    with pytest.raises(CxrdistError, match=r"no annotations/image_labels_train\.csv \(PhysioNet\)"):
        read(tmp_path)
    touch(tmp_path, "train/a.dicom")
    file = tmp_path / "image_labels_train.csv"
    header = ["image_id", "rad_id", *LABELS]
    write_csv(file, header[:-1], [])
    with pytest.raises(CxrdistError, match="has no column 'No finding'; fetch the table again"):
        read(tmp_path)
    write_csv(file, header, [["a", "R8", *[2] * 28]])
    with pytest.raises(CxrdistError, match="row 2: Aortic enlargement is '2', expected 1, 0"):
        read(tmp_path)
    write_csv(file, header, [["a", "R8", *[0] * 28]] * 2)
    with pytest.raises(CxrdistError, match="row 3: train/a already has a row of R8"):
        read(tmp_path)


def test_a_table_in_both_folders_is_refused_by_its_names(tmp_path):
    """Its rows are not at fault, so that none of them is to be removed."""
    folder = write_physionet(tmp_path)
    name = "image_labels_test.csv"
    shutil.copy(folder / "annotations" / name, folder)
    with pytest.raises(CxrdistError) as error:
        read(folder)
    assert str(error.value) == f"{folder / name}: is also in {folder / 'annotations'}; remove one"


def test_a_small_set_of_de_identified_dicom_files_is_packed(tmp_path):
    """Twelve training and four test images; sex and age come from the tags that are left."""
    folder = tmp_path / "vindr-cxr"
    random = np.random.default_rng(0)
    names = {image_name(number): "train" if number < 12 else "test" for number in range(16)}
    for name, split in names.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 4096, (40, 36))
        write_dicom(folder / split / f"{name}.dicom", pixels, bits=12, **TAGS)
    train = [
        (name, reader, ["Nodule/Mass" if number % 2 else "No finding"])
        for number, name in enumerate([name for name in names if names[name] == "train"])
        for reader in ("R8", "R9", "R10")
    ]
    test = [(name, "", ["Nodule/Mass"]) for name in names if names[name] == "test"]
    write_labels(folder / "annotations", "train", train)
    write_labels(folder / "annotations", "test", test)
    pack(PackConfig("vindr-cxr", folder, tmp_path / "out", size=32, anonymise=False, workers=1))
    index = read_index(tmp_path / "out")
    assert index.classes == LABELS
    counts = Counter(label for sample in index.samples for label in labels_of(sample.label))
    assert counts == {"Nodule/Mass": 10, "No finding": 6}
    held = Counter(sample.split for sample in index.samples)
    assert held["test"] == 4
    assert held["train"] + held["val"] == 12
    assert held["val"]
    assert {sample.path.split("/")[0] for sample in index.samples if sample.split == "test"} == {
        "test"
    }
    assert {(sample.view, sample.sex, sample.age) for sample in index.samples} == {
        ("PA", "F", "52")
    }
    assert len({sample.patient for sample in index.samples}) == 16
