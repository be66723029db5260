import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from cxrdist.config import PackConfig
from cxrdist.data.chestxray14 import LABELS
from cxrdist.data.labels import labels_of
from cxrdist.data.sources import read_source
from cxrdist.data.splits import assign_splits
from cxrdist.errors import CxrdistError

FINDINGS = ["No Finding", "Effusion|Atelectasis", "Hernia", "Pneumonia|Edema|Mass", "Pneumonia"]
HEADERS = {
    "Data_Entry_2017.csv": "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,"
    "Patient Gender,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],",
    "Data_Entry_2017_v2020.csv": "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,"
    "Patient Sex,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]",
}


def write_set(
    folder: Path, table: str, layout: str, patients: int = 40, *, lists: bool = True
) -> Path:
    """Three images a patient; a quarter of the patients is the official test list."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{p:08d}_{i:03d}.png" for p in range(1, patients + 1) for i in range(3)]
    end = "," if table == "Data_Entry_2017.csv" else ""
    rows = [HEADERS[table]]
    for number, name in enumerate(names):
        directory = folder / layout.format(number % 12 + 1)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
        finding, view = FINDINGS[number % len(FINDINGS)], ("PA", "AP")[number % 2]
        row = f"{name},{finding},{number % 3},{int(name[:8])},058Y,M,{view},2682,2749,0.143,0.143"
        rows.append(row + end)
    (folder / table).write_text("\n".join(rows) + "\n")
    if lists:
        test = {name for name in names if int(name[:8]) % 4 == 0}
        (folder / "test_list.txt").write_text("\n".join(sorted(test)))
        (folder / "train_val_list.txt").write_text("\n".join(n for n in names if n not in test))
    return folder


def read(folder: Path, **options: object):
    return read_source(PackConfig("chestxray14", folder, Path("out"), **options))


@pytest.mark.parametrize("layout", ["images", "images_{:03d}/images"])
@pytest.mark.parametrize("table", list(HEADERS))
def test_both_tables_and_both_layouts_give_the_same_records(tmp_path, table, layout):
    """Labels in the published order, patients, views and official splits."""
    source = read(write_set(tmp_path, table, layout))
    assert source.task == "multilabel"
    assert source.classes == list(LABELS)
    assert len(source.records) == 120
    counts = Counter(label for record in source.records for label in labels_of(record.label))
    assert counts == dict.fromkeys(("Atelectasis", "Effusion", "Hernia", "Mass", "Edema"), 24) | {
        "Pneumonia": 48
    }
    second = source.records[1]
    assert (second.path, second.label, second.patient, second.view, second.split) == (
        "00000001_001.png",
        "Atelectasis|Effusion",
        "00000001",
        "AP",
        "train+val",
    )
    assert second.file.is_file()
    assert {(record.sex, record.age) for record in source.records} == {("M", 58)}
    assert len({record.patient for record in source.records}) == 40
    assert Counter(record.split for record in source.records) == {"train+val": 90, "test": 30}
    assert {record.source for record in source.records} == {"ChestX-ray14"}


def test_the_official_test_list_stays_and_val_is_drawn_by_patient(tmp_path):
    """No patient of the official test list is in train or val, and none is in both of these."""
    source = read(write_set(tmp_path, "Data_Entry_2017.csv", "images"))
    splits = assign_splits(source, None, seed=0)
    where = {
        split: {r.patient for r, s in zip(source.records, splits, strict=True) if s == split}
        for split in ("train", "val", "test")
    }
    assert {int(patient) % 4 for patient in where["test"]} == {0}
    assert len(where["test"]) == 10
    assert where["val"]
    assert not where["train"] & where["val"]
    assert not (where["train"] | where["val"]) & where["test"]


def test_one_label_against_the_rest_is_of_two_classes(tmp_path):
    """Pneumonia with and without other labels, against all else."""
    folder = write_set(tmp_path, "Data_Entry_2017.csv", "images", lists=False)
    source = read(folder, against_rest="Pneumonia")
    assert source.task == "multiclass"
    assert source.classes == ["Pneumonia", "rest"]
    assert Counter(record.label for record in source.records) == {"Pneumonia": 48, "rest": 72}
    assert {record.split for record in source.records} == {None}
    with pytest.raises(
        CxrdistError, match="against-rest Flu: is not a label; expected one of Atel"
    ):
        read(folder, against_rest="Flu")


def test_what_is_wrong_is_named(tmp_path):
    """Images without a row, rows without an image, lists that lack one or stand alone."""
    folder = write_set(tmp_path, "Data_Entry_2017_v2020.csv", "images")
    (folder / "images" / "00000001_000.png").unlink()
    source = read(folder)
    assert source.notes == ("1 images of Data_Entry_2017_v2020.csv are not here",)
    assert ("00000001_000.png", "in the table, but not here") in source.left_out
    test_list = (folder / "test_list.txt").read_text()
    (folder / "test_list.txt").write_text(test_list.replace("00000004_001.png\n", ""))
    with pytest.raises(CxrdistError, match=r"row 12: 00000004_001\.png is in neither"):
        read(folder)
    (folder / "test_list.txt").unlink()
    with pytest.raises(CxrdistError, match=r"has only train_val_list\.txt"):
        read(folder)
    (folder / "train_val_list.txt").unlink()
    (folder / "images" / "00000099_000.png").touch()
    source = read(folder)
    assert ("images/00000099_000.png", "not in the table") in source.left_out
    assert source.num_found == len(source.records) + len(source.left_out) == 1 + 119 + 3 - 1
    assert any("is not the official one" in note for note in source.notes)
    table = folder / "Data_Entry_2017_v2020.csv"
    table.write_text(table.read_text().replace("Hernia", "Cold"))
    with pytest.raises(CxrdistError, match="row 4: 'Cold' is not one of the 14 labels"):
        read(folder)
    table.unlink()
    with pytest.raises(CxrdistError, match="has neither"):
        read(folder)


def test_the_real_table_is_read(real_data):
    """1,293 JPEGs whose table is the original's, with its 14 labels."""
    source = read(real_data / "nih14")
    assert len(source.records) == 1293
    with Image.open(source.records[0].file) as image:
        assert image.format == "JPEG"
    assert {record.view for record in source.records} == {"PA", "AP"}
    held = {label for record in source.records for label in labels_of(record.label)}
    assert held == set(LABELS)


def test_a_row_is_read_in_a_fraction_of_a_millisecond(tmp_path):
    """So that all 112,120 are read in seconds, not minutes."""
    folder = write_set(tmp_path, "Data_Entry_2017.csv", "images_{:03d}/images", patients=2000)
    start = time.process_time()
    read(folder)
    assert (time.process_time() - start) / 6000 < 0.5e-3


NIH_BOXES = """Image Index,Finding Label,Bbox [x,y,w,h],,,
00000001_000.png,Atelectasis,225.084745762712,547.019216763771,86.7796610169491,79.1864406779661
00000001_000.png,Infiltrate,512,256,256,128
00000001_001.png,Mass,512,256,256,128
00000001_002.png,Nodule,512,256,256,128
00000077_000.png,Nodule,512,256,256,128
"""


def write_boxes(folder: Path, text: str, name: str = "BBox_List_2017.csv") -> Path:
    """A set of two patients, of whose images three have boxes: an original, a half, a cut one."""
    write_set(folder, "Data_Entry_2017.csv", "images", patients=2)
    for number, size in enumerate(((1024, 1024), (512, 512), (1024, 900))):
        Image.new("L", size).save(folder / "images" / f"00000001_{number:03d}.png")
    (folder / name).write_text(text)
    return folder


def test_the_nihs_boxes_are_in_px_of_the_images_that_are_here(tmp_path):
    """As they are on 1024 px, halved on 512 px, none on what is no square; Infiltrate is read."""
    source = read(write_boxes(tmp_path, NIH_BOXES))
    first, half, cut, *others = source.records
    assert first.findings == (
        ("Atelectasis", 225.084745762712, 547.019216763771, 86.7796610169491, 79.1864406779661, ""),
        ("Infiltration", 512, 256, 256, 128, ""),
    )
    assert half.findings == (("Mass", 256, 128, 128, 64, ""),)
    assert not any(record.findings for record in (cut, *others))
    rounded = NIH_BOXES.replace("225.084745762712,", "937.3,")  # to 1024.08 px
    assert rounded != NIH_BOXES
    assert read(write_boxes(tmp_path, rounded)).records[0].findings[0].x == 937.3
    assert any("boxes on 4 images; 2 of them are here" in note for note in source.notes)


def test_boxes_in_px_of_the_images_here_stay_as_they_are(tmp_path):
    """boxes.csv has other columns; one of burned-in text has these not, and is none of disease."""
    row = "00000001_001.jpg,Mass,256.5,128,100,64"
    folder = write_boxes(tmp_path, f"image,label,x,y,width,height\n{row}\n", "boxes.csv")
    source = read(folder)
    assert source.records[1].findings == (("Mass", 256.5, 128, 100, 64, ""),)
    assert not any("boxes" in note for note in source.notes)
    (folder / "boxes.csv").write_text("path,x,y,width,height\n00000001_001.jpg,1,1,9,9\n")
    assert not any(record.findings for record in read(folder).records)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("Atelectasis,1,2,3", "row 2: fewer cells than columns"),
        ("Cold,1,2,3,4", "row 2: 'Cold' is not one of the 14 labels"),
        ("Mass,1,2,nan,4", "row 2: nan x 4 px at 1, 2 is not a valid box"),
        ("Mass,1,2,much,4", "row 2: could not convert"),
        ("Mass,1000,2,26,4", r"row 2: 26 x 4 px at 1000, 2 is not within the image of 1024 px"),
    ],
)
def test_a_box_that_cannot_be_one_is_named(tmp_path, row, fault):
    """Its row, and what is wrong with it."""
    header = NIH_BOXES.splitlines()[0]
    folder = write_boxes(tmp_path, f"{header}\n00000001_000.png,{row}\n")
    with pytest.raises(CxrdistError, match=fault):
        read(folder)


def test_real_boxes_are_of_labels_that_their_images_have(real_data):
    """47 boxes on 45 images of 512 px; all lie within."""
    boxed = [record for record in read(real_data / "nih14").records if record.findings]
    assert len(boxed) == 45
    findings = [(found, record) for record in boxed for found in record.findings]
    assert len(findings) == 47
    for found, record in findings:
        assert found.label in labels_of(record.label)
        assert 0 <= found.x < found.x + found.width <= 512
        assert 0 <= found.y < found.y + found.height <= 512
