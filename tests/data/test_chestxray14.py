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
    with pytest.raises(CxrdistError, match="against-rest Flu: is no label; expected one of Atel"):
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
    with pytest.raises(CxrdistError, match=r"has train_val_list\.txt alone"):
        read(folder)
    (folder / "train_val_list.txt").unlink()
    (folder / "images" / "00000099_000.png").touch()
    source = read(folder)
    assert ("images/00000099_000.png", "not in the table") in source.left_out
    assert source.num_found == len(source.records) + len(source.left_out) == 1 + 119 + 3 - 1
    assert any("is not the official one" in note for note in source.notes)
    table = folder / "Data_Entry_2017_v2020.csv"
    table.write_text(table.read_text().replace("Hernia", "Cold"))
    with pytest.raises(CxrdistError, match="row 4: 'Cold' is none of the 14 labels"):
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
    start = time.perf_counter()
    read(folder)
    assert (time.perf_counter() - start) / 6000 < 0.5e-3
