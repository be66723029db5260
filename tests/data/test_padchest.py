import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cxrdist.config import PackConfig
from cxrdist.data.chestxray14 import LABELS as CHESTXRAY14
from cxrdist.data.index import read_index
from cxrdist.data.labels import labels_of
from cxrdist.data.pack import pack
from cxrdist.data.padchest import LABELS
from cxrdist.data.sources import read_source
from cxrdist.errors import CxrdistError

MAP = Path(__file__).parents[2] / "shards/labels/padchest-to-chestxray14.yaml"
TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
# As the authors' notebook (auriml/Rx-thorax-automatic-captioning) prints it; the first has no name.
COLUMNS = (
    *("", "ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth"),
    *("PatientSex_DICOM", "ViewPosition_DICOM", "Projection", "MethodProjection", "Pediatric"),
    *("Modality_DICOM", "Manufacturer_DICOM", "PhotometricInterpretation_DICOM"),
    *("PixelRepresentation_DICOM", "PixelAspectRatio_DICOM", "SpatialResolution_DICOM"),
    *("BitsStored_DICOM", "WindowCenter_DICOM", "WindowWidth_DICOM", "Rows_DICOM", "Columns_DICOM"),
    *("XRayTubeCurrent_DICOM", "Exposure_DICOM", "ExposureInuAs_DICOM", "ExposureTime"),
    *("RelativeXRayExposure_DICOM", "ReportID", "Report", "MethodLabel", "Labels", "Localizations"),
    *("LabelsLocalizationsBySentence", "labelCUIS", "LocalizationsCUIS"),
)
PATIENT = "21194708879527664433843235475495105893"
ROW = {
    **{"ImageDir": "15", "StudyDate_DICOM": "20130802", "PatientBirth": "1940.0"},
    **{"PatientID": PATIENT, "PatientSex_DICOM": "M", "Projection": "PA", "Pediatric": "No"},
    **{"MethodProjection": "Manual review of DICOM fields", "Modality_DICOM": "CR"},
    **{"PixelAspectRatio_DICOM": "['1', '1']", "MethodLabel": "RNN_model"},
    **{"Report": "neumotorax apical derech con espesor aproxim 2 cm .", "ReportID": "4522082"},
    **{"labelCUIS": "['C2073565' 'C0149726']", "Localizations": "['loc apical', 'loc right']"},
}


def write_table(folder: Path, rows: list[dict[str, str]], name: str = TABLE) -> Path:
    """Write a table in the columns of the real one; what a row does not say is as in `ROW`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for number, row in enumerate(rows):
            writer.writerow({"": str(number), **ROW, **row})
    return folder


def write_set(folder: Path, rows: dict[str, dict[str, str]], layout: str = "{}") -> Path:
    """Write a table of images by their names, and an empty file for each."""
    for name, row in rows.items():
        place = folder / layout.format(row.get("ImageDir", "15"))
        place.mkdir(parents=True, exist_ok=True)
        (place / name).touch()
    return write_table(folder, [{"ImageID": name, **row} for name, row in rows.items()])


def read(folder: Path):
    return read_source(PackConfig("padchest", folder, Path("out")))


def by_name(source) -> dict[str, object]:
    return {Path(record.path).stem: record for record in source.records}


def without(*labels: str) -> list[str]:
    return [name for name in LABELS if name not in labels]


NODULE = {"Labels": "['nodule']"}


@pytest.mark.parametrize("layout", ["{}", "", "images-224/images-224", "BIMCV images/{}"])
def test_an_image_is_found_in_the_numbered_folders_and_in_one_folder(tmp_path, layout):
    """The zip files unpack into 0/ to 54/; copies have all in one folder, some as JPEG."""
    rows = {"a_02-002-109.png": NODULE, "b.png": {**NODULE, "ImageDir": "0"}}
    folder = write_set(tmp_path, rows, layout)
    copy = next(folder.rglob("b.png"))
    copy.rename(copy.with_suffix(".jpg"))
    source = read(folder)
    assert {Path(record.path).name for record in source.records} == {"a_02-002-109.png", "b.jpg"}
    assert all(record.file.is_file() for record in source.records)
    assert source.task == "multilabel"
    assert {record.split for record in source.records} == {None}


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("['pneumothorax', 'pulmonary mass']", "pneumothorax|pulmonary mass"),
        ("['endotracheal tube', '', ' infiltrates']", "endotracheal tube|infiltrates"),
        ("['nodule', 'nodule ', nan, 'nan']", "nodule"),
        ("[ 'nodule'  'COPD  signs' ]", "COPD signs|nodule"),
        ('["nodule", None]', "nodule"),
        ("['Nodule', 'NORMAL', 'copd signs']", "COPD signs|nodule"),
        ("['normal']", ""),
        ("['normal', 'suboptimal study']", ""),
        ("['suboptimal study', 'nodule', 'exclude']", "nodule"),
    ],
)
def test_labels_are_read_as_the_table_writes_them(tmp_path, text, label):
    """Odd blanks, empty and doubled labels, nan; remarks on the report are no findings."""
    source = read(write_set(tmp_path, {"a.png": {"Labels": text}, "b.png": NODULE}))
    assert by_name(source)["a"].label == label
    assert by_name(source)["a"].missing == ""
    assert {record.uncertain for record in source.records} == {""}


def test_images_of_which_no_label_is_known_are_left_out_by_name(tmp_path):
    """Without labels, and with a report that only says exclude, suboptimal or unchanged."""
    texts = ["", "[]", "['']", "[nan]", "['exclude']", "['suboptimal study', 'exclude']"]
    rows = {f"{number}.png": {"Labels": text} for number, text in enumerate(texts)}
    rows |= {"same.png": {"Labels": "['unchanged', '']"}, "z.png": NODULE}
    source = read(write_set(tmp_path, rows))
    assert list(by_name(source)) == ["z"]
    left_out = dict(source.left_out)
    silent = "its report tells no finding (exclude, suboptimal study)"
    assert [left_out[f"15/{number}.png"] for number in range(6)] == [
        *["has no labels in the table"] * 4,
        *[silent] * 2,
    ]
    assert left_out["15/same.png"].endswith("nothing has changed (unchanged)")
    assert source.num_found == len(source.records) + len(source.left_out)


def test_beside_unchanged_labels_that_are_not_named_are_missing(tmp_path):
    """What the earlier report said holds on, and is not told: no negative can be made of it."""
    rows = {
        "a.png": {"Labels": "['cardiomegaly', 'unchanged']"},
        "b.png": {"Labels": "['nodule', 'pneumonia']"},
        "c.png": {"Labels": "['normal', 'unchanged']"},
    }
    source = read(write_set(tmp_path, rows))
    first, *others = source.records
    assert (first.label, first.missing.split("|")) == ("cardiomegaly", without("cardiomegaly"))
    known = [(record.label, record.missing) for record in others]
    assert known == [("nodule|pneumonia", ""), ("", "")]
    notes = [note for note in source.notes if "a report that says unchanged" in note]
    assert notes == [
        "1 images have a report that says unchanged: labels that it does not name are missing"
    ]
    rows["a.png"]["Projection"] = "L"  # counted, and not packed
    source = read(write_set(tmp_path, rows))
    assert len(source.records) == 2
    assert f"{notes[0]} (before views are chosen)" in source.notes
    assert "has no official splits: they are drawn here, by patient" in source.notes


def test_classes_are_the_193_labels_of_the_paper_but_for_its_remarks(tmp_path):
    """So that a part of the images has the same; a label that is none of them is told."""
    source = read(
        write_set(tmp_path, {"a.png": {"Labels": "['nodule', 'unchanged', 'hemothorax']"}})
    )
    assert len(LABELS) == 174 + 19 - 4
    assert source.classes == sorted([*LABELS, "hemothorax"])
    assert source.records[0].label == "hemothorax|nodule"
    assert "1 labels of the table are not among the 189 known ones" in " ".join(source.notes)
    (tmp_path / "part").mkdir()
    part = read(write_set(tmp_path / "part", {"a.png": NODULE}))
    assert part.classes == list(LABELS)


def test_the_label_map_gives_each_label_one_of_chestxray14_s_or_none():
    """All 189 are named, so that no other class is left beside the 14."""
    labels = yaml.safe_load(MAP.read_text())
    assert sorted(labels) == sorted(LABELS)
    assert {ours for ours in labels.values() if ours is not None} == {*CHESTXRAY14}


def test_patient_view_sex_and_age_are_read(tmp_path):
    """Projection goes before the DICOM tag; the age is the year of the study less that of birth."""
    names = ("Projection", "ViewPosition_DICOM", "PatientSex_DICOM", "PatientBirth")
    rows = {
        "a": (("PA", "POSTEROANTERIOR", "M", "1940.0"), ("PA", "M", 73)),
        "b": (("L", "LL", "F", "2013"), ("LATERAL", "F", 0)),
        "c": (("AP", "", "O", "nan"), ("AP", "", None)),
        "d": (("AP_horizontal", "", "", ""), ("AP", "", None)),
        "e": (("COSTAL", "PA", "None", "2052.0"), ("OTHER", "", None)),
        "f": (("EXCLUDE", "", "M", "1850.0"), ("OTHER", "M", None)),
        "g": (("UNK", "ANTEROPOSTERIOR", "M", "1893.0"), ("AP", "M", 120)),
        "h": (("nan", "", "M", "1940.0"), ("", "M", 73)),
    }
    cells = {
        f"{name}.png": {**NODULE, **dict(zip(names, row, strict=True)), "PatientID": f"1{name}"}
        for name, (row, _) in rows.items()
    }
    source = read(write_set(tmp_path, cells))
    # Views that --views leaves out are no records.
    for name, record in by_name(source).items():
        assert (record.view, record.sex, record.age) == rows[name][1]
        assert record.patient == f"1{name}"
        assert record.source == "PadChest"
    assert {"a", "c", "d", "g", "h"} <= by_name(source).keys()


def test_a_patient_of_several_images_is_one_and_an_unknown_one_is_the_image_s_own(tmp_path):
    """Image names tell nothing of the patient; a rounded number might join strangers."""
    rows = {f"{name}.png": NODULE for name in "ab"}
    rows |= {
        f"{name}.png": {**NODULE, "PatientID": text} for name, text in (("c", ""), ("d", "nan"))
    }
    patients = [record.patient for record in read(write_set(tmp_path, rows)).records]
    assert patients == [PATIENT, PATIENT, "image:15/c.png", "image:15/d.png"]
    write_set(tmp_path, rows | {"b.png": {**NODULE, "PatientID": "2.11947E+37"}})
    with pytest.raises(
        CxrdistError, match=r"row 3: patient 2.11947E\+37 was rounded by a spreadsheet"
    ):
        read(tmp_path)


def test_all_that_is_found_is_packed_or_left_out(tmp_path):
    """Rows without an image, images without a row, and other folders."""
    folder = write_set(tmp_path, {"a.png": NODULE, "b.png": NODULE})
    (folder / "15" / "b.png").unlink()
    for stray in ("15/c.png", "masks/a.png", "notes.txt"):
        (folder / stray).parent.mkdir(exist_ok=True)
        (folder / stray).write_text("x")
    source = read(folder)
    assert source.left_out == (
        ("15/c.png", "not in the table"),
        (TABLE, "not an image"),
        ("b", "in the table, but not here"),
        ("masks/a.png", "outside of the data set's folders"),
        ("notes.txt", "not an image"),
    )
    assert source.num_found == 6
    assert f"1 images of {TABLE} are not here" in source.notes
    assert "1 of 1 images have labels that a network read" in " ".join(source.notes)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"Labels": "cardiomegaly"}, r"row 2: Labels is 'cardiomegaly', expected a list such as"),
        ({"Labels": "['nodule', mass]"}, "row 2: Labels is"),
        ({"Labels": "[['nodule']]"}, "row 2: Labels is"),
        ({"Labels": "['nodule'"}, "row 2: Labels is"),
        ({"Labels": "["}, "row 2: Labels is"),
        ({"Labels": "['cold', 'Cold']"}, "are two spellings of one name"),
        ({"ImageID": ""}, "row 2: ImageID is empty"),
        ({"ImageID": "b.png"}, r"row 3: b is also in .* row 2"),
    ],
)
def test_a_malformed_row_is_refused_by_its_number(tmp_path, row, message):
    """Its number, what is wrong with it, and what was expected."""
    write_set(tmp_path, {"a.png": NODULE, "b.png": NODULE})
    write_table(tmp_path, [{"ImageID": "a.png", **NODULE, **row}, {"ImageID": "b.png", **NODULE}])
    with pytest.raises(CxrdistError, match=message):
        read(tmp_path)


def test_a_folder_without_the_table_is_refused(tmp_path):
    """The name of the table is told, and a column that is missing."""
    with pytest.raises(CxrdistError, match=rf"has neither {TABLE} nor {TABLE}\.gz"):
        read(tmp_path)
    (tmp_path / TABLE).write_text("ImageID,PatientID,Projection\na.png,1,PA\n")
    with pytest.raises(CxrdistError, match="has no column 'Labels'; fetch the table again"):
        read(tmp_path)


def test_a_small_set_of_16_bit_pngs_is_packed(tmp_path):
    """Twelve patients with two images each: labels, views, ages and no patient in two splits."""
    random = np.random.default_rng(0)
    rows = {}
    for number in range(24):
        name = f"{number:038d}_{number}.png"
        label = ("['nodule']", "['normal']", "['mass', 'nodule']", "['mass', 'unchanged']")
        patient = {"PatientID": f"{number // 2}{'0' * 37}", "ImageDir": str(number % 3)}
        rows[name] = {"Labels": label[number // 2 % 4], **patient}
    folder = write_set(tmp_path / "PadChest", rows)
    for name, row in rows.items():
        pixels = random.integers(0, 4096, (40, 36), dtype=np.uint16)
        Image.fromarray(pixels).save(folder / row["ImageDir"] / name)
    pack(
        PackConfig("padchest", folder, tmp_path / "out", size=32, split="0.5/0.25/0.25", workers=1)
    )
    index = read_index(tmp_path / "out")
    assert index.classes == list(LABELS)
    assert len(index.samples) == 24
    counts = Counter(label for sample in index.samples for label in labels_of(sample.label))
    assert counts == {"mass": 12, "nodule": 12}
    missing = "|".join(without("mass"))
    assert Counter(sample.missing for sample in index.samples) == {"": 18, missing: 6}
    assert {(s.view, s.sex, s.age, s.source) for s in index.samples} == {
        ("PA", "M", "73", "PadChest")
    }
    assert len({sample.patient for sample in index.samples}) == 12
    assert len({(sample.patient, sample.split) for sample in index.samples}) == 12
