from collections import Counter
from pathlib import Path

import pytest
import yaml

from cxrdist.config import PackConfig, SourceConfig
from cxrdist.data import chestxray14, mimic_cxr
from cxrdist.data.chexpert import LABELS
from cxrdist.data.sources import read_source
from cxrdist.data.splits import assign_splits, describe_split
from cxrdist.errors import CxrdistError

MAP = Path(__file__).parents[2] / "shards/labels/chexpert-to-chestxray14.yaml"
# Headers as the files have them: train.csv and valid.csv, the test set of CheXlocalize (images),
# groundtruth.csv of cheXpert-test-set-labels (studies).
FINDINGS = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,"
    "Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,"
    "Support Devices"
)
HEADER = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{FINDINGS}"
# A first row of each kind as in train.csv, and the forms that AP/PA has there.
TRAIN = [
    ("patient00001/study1/view1_frontal.jpg", "Female,68,Frontal,AP,1.0,,,,,,,,,0.0,,,,1.0"),
    ("patient00002/study2/view1_frontal.jpg", "Female,87,Frontal,PA,,,-1.0,1.0,,-1.0,-1.0,,,,,,,"),
    ("patient00002/study1/view1_frontal.jpg", "Female,83,Frontal,LL,,,,1.0,,,-1.0,,,,,,1.0,"),
    ("patient00002/study1/view2_lateral.jpg", "Female,83,Lateral,,,,,1.0,,,-1.0,,,,,,1.0,"),
    ("patient00003/study1/view1_frontal.jpg", "Unknown,90,Frontal,,,,,,,1.0,,,,0.0,,,,"),
]
VALID = [
    (f"patient{64541 + i}/study1/view1_frontal.jpg", f"Male,73,Frontal,AP{',0.0' * 13},1.0")
    for i in range(2)
]
TEST = [f"patient64741/study1/view{view}.jpg" for view in ("1_frontal", "2_lateral")]
TEST += ["patient64742/study1/view1_frontal.jpg"]


def write_table(file: Path, prefix: str, rows: list[tuple[str, str]], header: str = HEADER) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [header, *(f"{prefix}{name},{cells}" for name, cells in rows)]
    file.write_text("\n".join(lines) + "\n")


def write_images(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_set(folder: Path, prefix: str = "CheXpert-v1.0/") -> Path:
    """train.csv and valid.csv with their images beside them."""
    for part, rows in (("train", TRAIN), ("valid", VALID)):
        write_table(folder / f"{part}.csv", f"{prefix}{part}/", rows)
        write_images(folder / part, [name for name, _ in rows])
    return folder


def add_test_set(folder: Path, table: str) -> None:
    """The test set under the names of one of those who hand it out."""
    if table == "groundtruth.csv":
        rows = [(f"patient6474{i}/study1", ",".join(f"{i % 2}" * 14)) for i in (1, 2)]
        write_table(folder / table, "CheXpert-v1.0/test/", rows, f"Study,{FINDINGS}")
    else:
        rows = [(name, ",".join(str(int(name[11]) % 2) * 14)) for name in TEST]
        write_table(folder / table, "test/", rows, f"Path,{FINDINGS}")
    write_images(folder / "test", TEST)


def read(folder: Path):
    return read_source(PackConfig("chexpert", folder, Path("out"), views="all"))


def move(folder: Path, layout: str) -> Path:
    """Lay a set out as it comes unpacked; the folder to give as --input."""
    home = folder.parent / "home"
    if layout == "beside":
        return folder
    home.mkdir()
    if layout == "below":
        folder.rename(home / "CheXpert-v1.0-small")
    else:
        first = home / "CheXpert-v1.0 batch 1 (validate & csv)"
        second = home / "CheXpert-v1.0 batch 2 (train 1)"
        (folder / "train").rename(second)
        folder.rename(first)
    return home


@pytest.mark.parametrize("layout", ["beside", "below", "batches"])
@pytest.mark.parametrize("prefix", ["CheXpert-v1.0/", "CheXpert-v1.0-small/", ""])
def test_all_layouts_give_the_same_records(tmp_path, layout, prefix):
    """Labels, uncertain and missing ones, patients, views, sex and age as the tables have them."""
    source = read(move(write_set(tmp_path / "set", prefix), layout))
    assert source.task == "multilabel"
    assert source.classes == list(LABELS) == FINDINGS.split(",")
    assert [record.path for record in source.records] == sorted(
        [f"train/{name}" for name, _ in TRAIN] + [f"valid/{name}" for name, _ in VALID]
    )
    records = {record.path.removeprefix("train/"): record for record in source.records}
    first, second, *others = (records[name] for name, _ in TRAIN)
    assert (first.patient, first.sex, first.age, first.view) == ("patient00001", "F", 68, "AP")
    assert (first.label, first.uncertain) == ("No Finding|Support Devices", "")
    assert first.missing.split("|") == [
        x for x in LABELS if x not in ("No Finding", "Pneumothorax", "Support Devices")
    ]
    assert (second.label, second.view) == ("Lung Opacity", "PA")
    assert second.uncertain == "Cardiomegaly|Edema|Consolidation"
    assert [record.view for record in others] == ["LATERAL", "LATERAL", "FRONTAL"]
    assert (others[2].sex, others[2].age) == ("", 90)
    assert {record.source for record in source.records} == {"CheXpert"}
    assert all(record.file.is_file() for record in source.records)
    assert (
        "1 images are 'Frontal' by Frontal/Lateral and 'LL' by AP/PA: they count as LATERAL"
        in source.notes
    )


def test_without_the_test_set_the_radiologists_images_are_test(tmp_path):
    """Val is drawn from train.csv by patient, so that nothing is chosen on what is scored."""
    source = read(write_set(tmp_path))
    assert Counter(record.split for record in source.records) == {"train+val": 5, "test": 2}
    start = "without the table of the test set "
    notes = [
        f"{start}valid.csv, labelled by radiologists, is test, and val is drawn from train.csv"
    ]
    assert [note for note in source.notes if note.startswith(start)] == notes
    splits = assign_splits(source, "0.5/0.5/0", seed=0)
    assert set(splits) == {"train", "val", "test"}
    assert describe_split(source, None).startswith("given by the source, val drawn")
    (tmp_path / "valid.csv").rename(tmp_path / "other.csv")
    assert f"{start}test is empty, and val is drawn from train.csv" in read(tmp_path).notes


@pytest.mark.parametrize("table", ["test.csv", "test_labels.csv", "groundtruth.csv"])
def test_with_the_test_set_the_splits_are_the_official_ones(tmp_path, table):
    """Rows of images and of studies; views by the file's name, since the table has none."""
    folder = write_set(tmp_path)
    add_test_set(folder, table)
    source = read(folder)
    assert Counter(record.split for record in source.records) == {"train": 5, "val": 2, "test": 3}
    test = [record for record in source.records if record.split == "test"]
    assert [(record.path, record.view, record.patient) for record in test] == [
        ("test/patient64741/study1/view1_frontal.jpg", "FRONTAL", "patient64741"),
        ("test/patient64741/study1/view2_lateral.jpg", "LATERAL", "patient64741"),
        ("test/patient64742/study1/view1_frontal.jpg", "FRONTAL", "patient64742"),
    ]
    assert [record.label for record in test] == ["|".join(LABELS)] * 2 + [""]
    assert {(record.sex, record.age, record.missing) for record in test} == {("", None, "")}
    assert not any("is the test split" in note for note in source.notes)


def test_all_that_is_there_is_packed_or_left_out(tmp_path):
    """Images without a row, rows without an image or repeated, other tables, other files."""
    folder = write_set(tmp_path)
    write_table(folder / "train.csv", "train/", [*TRAIN, TRAIN[0]])
    add_test_set(folder, "groundtruth.csv")
    add_test_set(folder, "test_labels.csv")
    (folder / "valid" / VALID[0][0]).unlink()
    (folder / "train_cheXbert.csv").write_text(HEADER)
    write_images(folder, ["train/patient00009/study1/view1_frontal.jpg", "train/note.jpg"])
    source = read(folder)
    assert set(source.left_out) == {
        ("groundtruth.csv", "not an image"),
        ("patient00001/study1/view1_frontal", "in the table, but for the second time"),
        ("patient64541/study1/view1_frontal", "in the table, but not here"),
        ("test_labels.csv", "not an image"),
        ("train.csv", "not an image"),
        ("train/note.jpg", "outside of the data set's folders"),
        ("train/patient00009/study1/view1_frontal.jpg", "not in the table"),
        ("train_cheXbert.csv", "not an image"),
        ("valid.csv", "not an image"),
    }
    assert source.num_found == len(source.records) + len(source.left_out)
    assert "groundtruth.csv, train_cheXbert.csv: not read" in source.notes
    assert "1 images of train.csv and valid.csv and test_labels.csv are not here" in source.notes


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("train.csv", "-1.0", "2", r"train.csv row 3: Cardiomegaly is '2', expected 1, 0, -1, U"),
        ("train.csv", "/study2/", "/", r"row 3: 'CheXpert-v1.0/train/patient00002/view1_fro.*' do"),
        ("valid.csv", "Edema", "Oedema", r"valid.csv: has no column 'Edema'; fetch the table"),
        ("valid.csv", "Path", "File", r"valid.csv: has no column 'Path'"),
        ("train.csv", "Sex,Age", "Age,age", r"the columns 'Age' and 'age' are both the Age"),
    ],
)
def test_a_malformed_table_is_named_by_row_or_column(tmp_path, file, old, new, message):
    """What was wrong and how to mend it, in one line."""
    folder = write_set(tmp_path)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    with pytest.raises(CxrdistError, match=message) as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_what_is_no_chexpert_is_refused(tmp_path):
    """No folder, no table, two of one table or image, a test set without its images."""
    with pytest.raises(CxrdistError, match="has no table, here or in a folder below; expected one"):
        read(tmp_path)
    folder = write_set(tmp_path / "both" / "CheXpert-v1.0")
    (folder / "groundtruth.csv").write_text(
        f"Study,{FINDINGS}\ntest/patient64741/study1{',1' * 14}"
    )
    with pytest.raises(
        CxrdistError, match=r"groundtruth.csv: none of its images is here; download"
    ):
        read(folder)
    (folder / "groundtruth.csv").unlink()
    small = write_set(tmp_path / "both" / "CheXpert-v1.0-small")
    with pytest.raises(CxrdistError, match=r"train.csv: is also in .*CheXpert-v1.0; remove one"):
        read(small.parent)
    for table in small.glob("*.csv"):
        table.unlink()
    with pytest.raises(CxrdistError, match=r"view1_frontal.jpg: is also in .*; remove one"):
        read(small.parent)


@pytest.mark.parametrize(
    ("cells", "view", "note"),
    [
        ("Lateral,PA", "LATERAL", "'Lateral' by Frontal/Lateral and 'PA' by AP/PA: they count as"),
        ("Lateral,LL", "LATERAL", ""),
        ("Frontal,RL", "LATERAL", "'Frontal' by Frontal/Lateral and 'RL' by AP/PA: they count as"),
        (",AP", "AP", ""),
        (",", "FRONTAL", ""),
        ("Sideways,", "FRONTAL", "'Sideways' by Frontal/Lateral and '' by AP/PA: they count as"),
    ],
)
def test_a_view_that_is_told_in_two_ways_is_said(tmp_path, cells, view, note):
    """Lateral wins, since only frontal images are packed if nothing else is asked for."""
    folder = write_set(tmp_path)
    table = folder / "train.csv"
    table.write_text(
        table.read_text().replace("Frontal,LL", "Frontal,AP").replace("Frontal,PA", cells)
    )
    source = read(folder)
    changed = next(record for record in source.records if "patient00002/study2" in record.path)
    assert changed.view == view
    said = [line for line in source.notes if "by AP/PA" in line]
    assert [line for line in said if f"1 images are {note} {view}" in line] == said
    assert len(said) == bool(note)


def test_the_map_to_chestxray14_names_each_label_of_both_sets():
    """CheXpert and MIMIC-CXR have one vocabulary in two orders; seven labels are in both worlds."""
    mapping = yaml.safe_load(MAP.read_text())
    assert {*mapping} == {*LABELS} == {*mimic_cxr.LABELS}
    ours = [label for label in mapping.values() if label]
    assert len({*ours}) == len(ours) == 7
    assert {*ours} < {*chestxray14.LABELS}


def test_a_source_of_several_takes_the_packaged_label_map_by_its_name(tmp_path):
    """As --label-map does; a file of this name beside the list has precedence."""
    write_set(tmp_path / "set")
    listed = tmp_path / "several.yaml"
    listed.write_text("them: {source: chexpert, input: set, label_map: chexpert-to-chestxray14}\n")
    mapped = set(yaml.safe_load(MAP.read_text()).values()) - {None}
    assert set(read_source(SourceConfig("several", listed)).classes) == mapped
    (tmp_path / "chexpert-to-chestxray14").write_text("Fracture: Break\n")
    assert "Break" in read_source(SourceConfig("several", listed)).classes
