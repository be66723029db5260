import gzip
from collections import Counter
from pathlib import Path

import pytest

from cxrdist.config import PackConfig
from cxrdist.data.mimic_cxr import LABELS
from cxrdist.data.sources import read_source
from cxrdist.errors import CxrdistError

# Headers as PhysioNet's files have them.
METADATA = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,"
    "StudyDate,StudyTime,ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
    "PatientOrientationCodeSequence_CodeMeaning"
)
CHEXPERT = (
    "subject_id,study_id,Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,"
    "Fracture,Lung Lesion,Lung Opacity,No Finding,Pleural Effusion,Pleural Other,Pneumonia,"
    "Pneumothorax,Support Devices"
)
SPLIT = "dicom_id,study_id,subject_id,split"
PATIENTS = "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod"
# Subject, study, dicom_id, ViewPosition, its code, split.
IMAGES = [
    (10000032, 50414267, "02aa804e-bde0afdd", "PA", "postero-anterior", "train"),
    (10000032, 50414267, "174413ec-4ec4c1f7", "LATERAL", "lateral", "train"),
    (10000032, 53189527, "2a2277a9-b0ded155", "", "antero-posterior", "train"),
    (10000764, 57375967, "096052b7-d256dc40", "LL", "left lateral", "validate"),
    (10000898, 50771383, "2a280266-c8bae121", "AP AXIAL", "", "test"),
    (10000898, 54205396, "68c710e6-e0a0d0b8", "", "", "test"),
    (10000898, 54205396, "68c710e6-ffffffff", "SIDEWAYS", "", "test"),
    (10000898, 54205396, "68c710e6-fffffff0", "SIDEWAYS", "postero-anterior", "test"),
    (10000898, 54205396, "68c710e6-fffffff1", "", "from above", "test"),
    (10000935, 50578979, "d0b71acc-b5a62046", "AP", "antero-posterior", "train"),
]
STUDIES = {
    (10000032, 50414267): ",,,,,,,,1.0,,,,,",
    (10000032, 53189527): "-1.0,1.0,0.0,,,,,,,,,,,1.0",
    (10000764, 57375967): ",,1.0,,,,,,,,,-1.0,,",
    (10000898, 50771383): "0.0,0.0,,,,,,,,,,,,",
    (10000898, 54205396): ",,,,,,,,,,,,,",
}


def write(file: Path, rows: list[str], packed: bool) -> None:
    data = ("\n".join(rows) + "\n").encode()
    if packed:
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(data))
    else:
        file.write_bytes(data)


def write_set(folder: Path, *, packed: bool = True, suffix: str = ".jpg") -> Path:
    """Ten images of four patients; study 50578979 has no labels."""
    for subject, study, dicom, *_ in IMAGES:
        home = folder / "files" / f"p{str(subject)[:2]}" / f"p{subject}" / f"s{study}"
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{dicom}{suffix}").touch()
    metadata = [
        f"{dicom},{subject},{study},CHEST (PA AND LAT),{view},3056,2544,21800506,213014.531,"
        f"CHEST (PA AND LAT),{code},Erect"
        for subject, study, dicom, view, code, _ in IMAGES
    ]
    splits = [f"{dicom},{study},{subject},{s}" for subject, study, dicom, _, _, s in IMAGES]
    labels = [f"{subject},{study},{cells}" for (subject, study), cells in STUDIES.items()]
    for name, rows in (
        ("metadata", [METADATA, *metadata]),
        ("split", [SPLIT, *splits]),
        ("chexpert", [CHEXPERT, *labels]),
    ):
        write(folder / f"mimic-cxr-2.0.0-{name}.csv", rows, packed)
    return folder


def read(folder: Path):
    return read_source(PackConfig("mimic-cxr", folder, Path("out"), views="all"))


@pytest.mark.parametrize("packed", [True, False])
def test_tables_packed_or_not_give_the_same_records(tmp_path, packed):
    """Labels of the study, patients, views by position or else by code, official splits."""
    source = read(write_set(tmp_path, packed=packed))
    assert source.task == "multilabel"
    assert source.classes == list(LABELS) == CHEXPERT.split(",")[2:]
    records = {record.file.stem: record for record in source.records}
    assert [(r.patient, r.view, r.split) for r in (records[x[2]] for x in IMAGES[:-1])] == [
        ("p10000032", "PA", "train"),
        ("p10000032", "LATERAL", "train"),
        ("p10000032", "AP", "train"),
        ("p10000764", "LATERAL", "val"),
        ("p10000898", "OTHER", "test"),
        ("p10000898", "", "test"),
        ("p10000898", "", "test"),
        ("p10000898", "PA", "test"),
        ("p10000898", "", "test"),
    ]
    first, lateral, second = (records[x[2]] for x in IMAGES[:3])
    assert first.path == "files/p10/p10000032/s50414267/02aa804e-bde0afdd.jpg"
    assert first.label == lateral.label == "No Finding"
    assert (second.label, second.uncertain) == ("Cardiomegaly|Support Devices", "Atelectasis")
    assert second.missing.split("|") == list(LABELS[3:-1])
    assert records["68c710e6-e0a0d0b8"].missing.split("|") == list(LABELS)
    assert {(r.sex, r.age, r.source) for r in source.records} == {("", None, "MIMIC-CXR")}
    assert set(source.notes) == {
        "1 images have the view 'SIDEWAYS', which counts as unknown",
        "1 images have the view 'from above', which counts as unknown",
        "without patients.csv.gz of MIMIC-IV sex and age are not known",
    }


def test_images_of_a_study_without_labels_are_left_out(tmp_path):
    """As are images without a row and rows without an image; all are counted."""
    folder = write_set(tmp_path)
    (folder / "files" / "p10" / "p10000764" / "s57375967" / "096052b7-d256dc40.jpg").unlink()
    (folder / "files" / "p10" / "p10000764" / "s57375967" / "ffffffff-00000000.jpg").touch()
    (folder / "logo.png").touch()
    source = read(folder)
    assert [left for left in source.left_out if left.reason != "not an image"] == [
        (
            "files/p10/p10000764/s57375967/ffffffff-00000000.jpg",
            "not in the table",
        ),
        (
            "files/p10/p10000935/s50578979/d0b71acc-b5a62046.jpg",
            "its study has no row in mimic-cxr-2.0.0-chexpert.csv",
        ),
        ("logo.png", "outside of the data set's folders"),
        ("p10000764/s57375967/096052b7-d256dc40", "in the table, but not here"),
    ]
    assert source.num_found == len(source.records) + len(source.left_out)
    assert "1 images of mimic-cxr-2.0.0-metadata.csv.gz are not here" in source.notes


def test_mimic_iv_tells_sex_and_the_age_at_the_study(tmp_path):
    """anchor_age is of anchor_year; a study five years later is of a patient five years older."""
    folder = write_set(tmp_path)
    rows = [PATIENTS, "10000032,F,52,2175,2014 - 2016,", "10000764,M,91,2180,2014 - 2016,"]
    rows += ["10000898,F,2,2183,2014 - 2016,"]
    write(folder / "patients.csv", rows, packed=True)
    source = read(folder)
    assert source.notes[0] == "5 images have no age by patients.csv.gz"
    assert {(record.patient, record.sex, record.age) for record in source.records} == {
        ("p10000032", "F", 57),
        ("p10000764", "M", 91),
        ("p10000898", "F", None),
    }


def test_without_the_split_table_no_split_is_given(tmp_path):
    """And tables that are there and not read are named."""
    folder = write_set(tmp_path)
    (folder / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    write(folder / "mimic-cxr-2.0.0-negbio.csv", [CHEXPERT], packed=True)
    write(folder / "mimic-cxr-2.1.0-test-set-labeled.csv", ["study_id"], packed=False)
    source = read(folder)
    assert Counter(record.split for record in source.records) == {None: 9}
    labels = "not read, the labels are those of mimic-cxr-2.0.0-chexpert.csv.gz"
    assert {
        "without mimic-cxr-2.0.0-split.csv.gz the split is drawn here and is not the official one",
        f"mimic-cxr-2.0.0-negbio.csv: {labels}",
        f"mimic-cxr-2.1.0-test-set-labeled.csv: {labels}",
    } < set(source.notes)


def test_the_dicom_files_of_mimic_cxr_are_read_by_the_same_tables(tmp_path):
    """They have the same names and folders."""
    source = read(write_set(tmp_path, suffix=".dcm"))
    assert len(source.records) == 9
    assert source.dicom


@pytest.mark.parametrize(
    ("table", "old", "new", "message"),
    [
        ("chexpert", "-1.0,1.0", "2,1.0", r"chexpert.csv row 3: Atelectasis is '2', expected 1"),
        ("chexpert", "10000764", "10000765", r"row 5: study 57375967 is of subject 10000764, but"),
        ("chexpert", "53189527", "50414267", r"row 3: study 50414267 has two rows; fetch"),
        ("chexpert", "Edema", "Oedema", r"chexpert.csv: has no column 'Edema'"),
        ("split", "validate", "dev", r"row 5: the split is 'dev', expected train, validate, test"),
        ("split", "02aa804e-bde0afdd", "x", r"metadata.csv row 2: 02aa804e-bde0afdd has no row in"),
        ("metadata", "ViewPosition", "View", r"metadata.csv: has no column 'ViewPosition'"),
    ],
)
def test_a_malformed_table_is_named_by_row_or_column(tmp_path, table, old, new, message):
    """What was wrong and how to mend it, in one line."""
    folder = write_set(tmp_path, packed=False)
    file = folder / f"mimic-cxr-2.0.0-{table}.csv"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(CxrdistError, match=message) as error:
        read(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("table", ["metadata", "chexpert"])
def test_a_missing_table_is_named(tmp_path, table):
    """Before any folder is looked into."""
    folder = write_set(tmp_path)
    (folder / f"mimic-cxr-2.0.0-{table}.csv.gz").unlink()
    with pytest.raises(CxrdistError, match=rf"has neither mimic-cxr-2.0.0-{table}.csv nor mimic"):
        read(folder)
