"""The tables of images that launch/paper.sh makes, read as `cxrdist pack` reads them."""

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from sources import adults, covid3, findings, words

from cxrdist.config import SourceConfig
from cxrdist.data.chestxray14 import LABELS
from cxrdist.data.index import read_index
from cxrdist.data.sources import read_source
from cxrdist.errors import CxrdistError

TABLES = {
    "paper_like/table.csv": """path,label,patient,view
COVID-19/scan-day1.jpg,COVID-19,p1,PA
COVID-19/scan-day2.jpg,COVID-19,p1,PA
COVID-19/other.jpg,COVID-19,p2,PA
Normal/child.jpg,Normal,n1,AP
Viral Pneumonia/child.jpg,Viral Pneumonia,v1,AP
""",
    "adult_normal/table.csv": """path,patient,age,sex,view,nih_labels
images/00000001_000.jpg,00000001,61,M,AP,Infiltration|Mass
images/00000002_000.jpg,00000002,17,F,PA,No Finding
""",
    "nih14/Data_Entry_2017_v2020.csv": """Image Index,Finding Labels,Patient ID,\
Patient Age,Patient Sex,View Position
00000001_001.jpg,Pneumonia|Edema,1,62,M,AP
00000003_000.jpg,Pneumonia,3,16,F,PA
00000004_000.jpg,No Finding,4,50,F,PA
""",
}
IMAGES = (
    *(f"paper_like/COVID-19/{name}.jpg" for name in ("scan-day1", "scan-day2", "other")),
    *(f"paper_like/{name}/child.jpg" for name in ("Normal", "Viral Pneumonia")),
    *(f"adult_normal/images/0000000{number}_000.jpg" for number in (1, 2)),
    *(f"nih14/images/{name}.jpg" for name in ("00000001_001", "00000003_000", "00000004_000")),
    *(f"covid3/COVID-19/{name}.jpg" for name in ("scan-day2", "scan-day7", "unknown")),
    *(f"covid3/Pneumonia/{name}.jpg" for name in ("00000001_001", "00000003_000")),
    "covid3/Normal/00000004_000.jpg",
)


@pytest.fixture
def data(tmp_path) -> Path:
    """The folders of DATA; in both tables of ages an image is of a child."""
    folder = tmp_path / "data"
    for name in IMAGES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(folder / name)
    for name, text in TABLES.items():
        (folder / name).write_text(text)
    return folder


def test_findings_are_the_14_labels_of_both_folders(data, tmp_path):
    """Children too; a patient of both folders is one patient."""
    findings(data, tmp_path / "out")
    source = read_source(SourceConfig("several", tmp_path / "out" / "sources.yaml"))
    assert set(source.classes) == set(LABELS)
    labels = Counter(record.label for record in source.records)
    assert labels == {"Infiltration|Mass": 1, "Pneumonia|Edema": 1, "Pneumonia": 1, "": 2}
    assert sum(record.patient == "chestxray14/00000001" for record in source.records) == 2


def test_adults_are_the_images_whose_age_is_no_childs(data, tmp_path):
    """COVID-19 as it is; of NIH's images only adults, and one patient in two classes stays one."""
    adults(data, tmp_path / "out")
    source = read_source(SourceConfig("several", tmp_path / "out" / "sources.yaml"))
    found = {(record.label, record.patient, record.age) for record in source.records}
    assert found == {
        ("COVID-19", "covid:p1", None),
        ("COVID-19", "covid:p2", None),
        ("Normal", "chestxray14/00000001", 61.0),
        ("Pneumonia", "chestxray14/00000001", 62.0),
    }
    assert len(source.records) == 5


def test_covid3_has_the_patients_of_both_collections(data, tmp_path):
    """By name in paper_like, also of another day; an unknown image is a patient of its own."""
    covid3(data, tmp_path / "out")
    source = read_source(SourceConfig("csv", tmp_path / "out" / "table.csv"))
    assert {Path(record.path).stem: record.patient for record in source.records} == {
        "scan-day2": "p1",
        "scan-day7": "p1",
        "unknown": "image:images/COVID-19/unknown.jpg",
        "00000001_001": "00000001",
        "00000003_000": "00000003",
        "00000004_000": "00000004",
    }


def test_text_is_looked_for_in_the_test_images_alone(shards, tmp_path):
    """Under the paths that the shards have, so that boxes found there fit the whole set."""
    index, images, out = read_index(shards), tmp_path / "data" / "paper_like", tmp_path / "out"
    for folder in (images, out):
        folder.mkdir(parents=True)
    for name in index.classes:
        (images / name).symlink_to(shards.parent / "images" / name)
    (out / "shards-3").symlink_to(shards)
    rows = [f"{sample.path},{sample.label},{sample.patient}" for sample in index.samples]
    (images / "table.csv").write_text("\n".join(["path,label,patient", *rows]))
    words(tmp_path / "data", out / "words-3")
    found = read_source(SourceConfig("csv", out / "words-3" / "table.csv"))
    expected = {index.samples[number].path for number in index.numbers("test")}
    assert {record.path for record in found.records} == expected


def test_a_table_without_a_column_is_refused_by_name(data, tmp_path):
    """Before anything is written."""
    table = data / "adult_normal" / "table.csv"
    table.write_text(table.read_text().replace("nih_labels", "findings"))
    with pytest.raises(CxrdistError, match=r"adult_normal/table\.csv: has no column nih_labels"):
        findings(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
