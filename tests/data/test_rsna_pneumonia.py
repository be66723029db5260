import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_dicom
from PIL import Image

from cxrdist.config import PackConfig
from cxrdist.data.pack import pack
from cxrdist.data.rsna_pneumonia import MAPPING
from cxrdist.data.sources import read_source
from cxrdist.errors import CxrdistError

NAMES = [f"{i:08x}-5c4a-4a3b-9f0e-00000000000{i}" for i in range(6)]
OPACITY, OTHER, NORMAL = "Lung Opacity", "No Lung Opacity / Not Normal", "Normal"
# One row for each box, as in the real tables; the second image has two.
BOXES = f"""patientId,x,y,width,height,Target
{NAMES[0]},,,,,0
{NAMES[1]},264.0,152.0,213.0,379.0,1
{NAMES[1]},562.0,152.0,256.0,453.0,1
{NAMES[2]},323.0,577.0,160.0,104.0,1
{NAMES[3]},,,,,0
{NAMES[4]},,,,,0
"""
READINGS = f"""patientId,class
{NAMES[0]},{OTHER}
{NAMES[1]},{OPACITY}
{NAMES[1]},{OPACITY}
{NAMES[2]},{OPACITY}
{NAMES[3]},{NORMAL}
{NAMES[4]},{NORMAL}
"""


def write_set(folder: Path, suffix: str = ".dcm") -> Path:
    """Stage 2 as Kaggle's archive unpacks: five training images, and one of test."""
    (folder / "stage_2_train_images").mkdir(parents=True)
    (folder / "stage_2_test_images").mkdir()
    (folder / "stage_2_train_labels.csv").write_text(BOXES)
    (folder / "stage_2_detailed_class_info.csv").write_text(READINGS)
    (folder / "stage_2_sample_submission.csv").write_text(f"patientId\n{NAMES[5]}\n")
    for name in NAMES[:5]:
        (folder / "stage_2_train_images" / f"{name}{suffix}").touch()
    (folder / "stage_2_test_images" / f"{NAMES[5]}{suffix}").touch()
    return folder


def write_mapping(folder: Path, names: list[str]) -> None:
    """RSNA's list of origins; images 0 and 3 are of one patient."""
    entries = [
        {
            "subset_img_id": name,
            "img_id": f"{(i % 3) + 61:08d}_00{i}.png",
            "subset_group": i,
            "orig_labels": ["Infiltration"],
            "StudyInstanceUID": f"1.2.{i}",
        }
        for i, name in enumerate(names)
    ]
    (folder / MAPPING).write_text(json.dumps(entries))


def read(folder: Path):
    return read_source(PackConfig("rsna-pneumonia", folder, Path("out")))


def test_both_tables_give_classes_boxes_and_what_is_left_out(tmp_path):
    """Three classes, several boxes on one image, test images by name; no patient is known."""
    folder = write_set(tmp_path)
    (folder / "stage_2_test_images" / "index.html").touch()
    source = read(folder)
    assert source.task == "multiclass"
    assert source.classes == [OPACITY, OTHER, NORMAL]
    assert source.dicom
    assert [(Path(r.path).stem, r.label) for r in source.records] == [
        (NAMES[0], OTHER),
        (NAMES[1], OPACITY),
        (NAMES[2], OPACITY),
        (NAMES[3], NORMAL),
        (NAMES[4], NORMAL),
    ]
    assert source.records[1].findings == (
        (OPACITY, 264, 152, 213, 379, ""),
        (OPACITY, 562, 152, 256, 453, ""),
    )
    assert [len(record.findings) for record in source.records] == [0, 2, 1, 0, 0]
    assert {record.source for record in source.records} == {"RSNA"}
    assert [record.patient for record in source.records] == NAMES[:5]
    assert any(f"without {MAPPING}" in note for note in source.notes)
    reasons = Counter(left.reason for left in source.left_out)
    assert reasons == {
        "not an image": 4,
        "test image of the challenge, of which no label is given": 1,
    }
    assert source.num_found == len(source.records) + len(source.left_out) == 10


def test_patients_are_the_nihs_where_rsnas_mapping_is_there(tmp_path):
    """So that two images of one patient stay in one split; a mapping of others is refused."""
    folder = write_set(tmp_path)
    write_mapping(folder, NAMES)
    source = read(folder)
    assert [record.patient for record in source.records] == [
        *("00000061", "00000062", "00000063", "00000061", "00000062")
    ]
    assert source.notes == ()
    write_mapping(folder, NAMES[:3])
    with pytest.raises(CxrdistError, match=rf"2018\.json: lacks {NAMES[3]}; fetch it again"):
        read(folder)
    (folder / MAPPING).write_text('[{"subset_img_id": "a", "img_id": "1.png"}]')
    with pytest.raises(CxrdistError, match=r"img_id.*a name such as 00000001_000\.png"):
        read(folder)


def test_boxes_shrink_with_copies_of_the_images(tmp_path):
    """A PNG of 256 px has boxes of a quarter; one that is no square has none, which is said."""
    folder = write_set(tmp_path, ".png")
    Image.new("L", (256, 256)).save(folder / "stage_2_train_images" / f"{NAMES[1]}.png")
    Image.new("L", (256, 200)).save(folder / "stage_2_train_images" / f"{NAMES[2]}.png")
    source = read(folder)
    assert source.records[1].findings[0] == (OPACITY, 66, 38, 53.25, 94.75, "")
    assert source.records[2].findings == ()
    assert any("1 images cannot be read or are not square" in note for note in source.notes)


@pytest.mark.parametrize(
    ("table", "before", "after", "fault"),
    [
        ("labels", "577.0,160.0", "577.0,800.0", "row 5: 800 x 104 px at 323, 577 is not within"),
        ("labels", "160.0,104.0,1", "160.0,104.0,2", "row 5: Target is '2', expected 0 or 1"),
        ("labels", "patientId,x", "patient,x", "has no column 'patientId'"),
        ("labels", f"{NAMES[4]},,,,,0\n", "", f"{NAMES[4]} is in only one of"),
        ("class", f"{NAMES[3]},Normal", f"{NAMES[3]},Well", "row 6: the class 'Well', expected"),
        ("class", f"{NAMES[3]},Normal", f"{NAMES[3]},{OPACITY}", "but has 0 boxes in"),
        ("class", f"{NAMES[1]},{OPACITY}\n{NAMES[2]}", f"{NAMES[1]},Normal\n{NAMES[2]}", "before"),
    ],
)
def test_a_malformed_table_is_one_line(tmp_path, table, before, after, fault):
    """The row, what is wrong, and what was expected."""
    folder = write_set(tmp_path)
    names = {"labels": "stage_2_train_labels.csv", "class": "stage_2_detailed_class_info.csv"}
    file = folder / names[table]
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))
    with pytest.raises(CxrdistError, match=fault):
        read(folder)
    file.unlink()
    with pytest.raises(CxrdistError, match=f"has no {file.name}; expected the files of stage 2"):
        read(folder)


def test_a_pack_has_view_sex_and_age_of_the_dicom_files(tmp_path):
    """The PatientID of the challenge, which tells the image alone, is not taken for a patient."""
    folder = write_set(tmp_path / "rsna")
    write_mapping(folder, NAMES)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64), dtype=np.uint8)
    for i, name in enumerate(NAMES[:5]):
        write_dicom(
            folder / "stage_2_train_images" / f"{name}.dcm",
            pixels[i],
            PatientID=name,
            PatientSex="FM"[i % 2],
            PatientAge=str(40 + i),
            ViewPosition=("PA", "AP")[i % 2],
        )
    out = tmp_path / "shards"
    options = {"size": 32, "split": "0/0/1", "workers": 1, "anonymise": False}
    pack(PackConfig("rsna-pneumonia", folder, out, **options))
    with open(out / "samples.csv", newline="") as file:
        samples = list(csv.DictReader(file))
    told = {(s["patient"], s["sex"], s["age"], s["view"], s["source"]) for s in samples}
    assert told == {
        ("00000061", "F", "40", "PA", "RSNA"),
        ("00000062", "M", "41", "AP", "RSNA"),
        ("00000063", "F", "42", "PA", "RSNA"),
        ("00000061", "M", "43", "AP", "RSNA"),
        ("00000062", "F", "44", "PA", "RSNA"),
    }
    audit = json.loads((out / "audit.json").read_text())
    assert audit["in_pre_training"]["splits"]["test"]["all"] == 5
