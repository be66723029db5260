"""Several sources packed together: paths, patients, labels, splits, and what is refused."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_dicom
from PIL import Image
from support import contents

from cxrdist.config import PackConfig, SourceConfig
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.data.sources import read_source
from cxrdist.errors import CxrdistError

NIH = ("Image Index", "Finding Labels", "Patient ID", "View Position")


def write_csv(file: Path, *rows: tuple[str, ...]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="") as table:
        csv.writer(table).writerows(rows)
    for path, *_ in rows[1:]:
        (file.parent / path).touch()
    return file


def write_nih(folder: Path) -> Path:
    """A ChestX-ray14 of four images, with the official lists."""
    findings = ("No Finding", "Mass|Hernia", "Mass", "Effusion")
    names = [f"{patient:08d}_000.png" for patient in (1, 2, 3, 4)]
    rows = [(n, f, str(int(n[:8])), "PA") for n, f in zip(names, findings, strict=True)]
    write_csv(folder / "Data_Entry_2017_v2020.csv", NIH, *rows)
    (folder / "images").mkdir()
    for name in names:
        (folder / name).rename(folder / "images" / name)
    (folder / "train_val_list.txt").write_text("\n".join(names[:3]))
    (folder / "test_list.txt").write_text(names[3])
    return folder


CLINIC = (
    ("path", "labels", "patient", "view"),
    ("1.png", "Tumour|Fracture", "00000001", "AP"),
    ("2.png", "", "00000001", "lateral"),
    ("3.png", "Cardiomegaly", "", ""),
)
TWO = """
nih: {source: chestxray14, input: nih}
clinic: {source: csv, input: clinic/images.csv, label_map: clinic/map.yaml}
"""


@pytest.fixture
def both(tmp_path) -> Path:
    """ChestX-ray14 and a clinic's table, whose label for a mass is another."""
    write_nih(tmp_path / "nih")
    write_csv(tmp_path / "clinic" / "images.csv", *CLINIC)
    (tmp_path / "clinic" / "map.yaml").write_text("Tumour: Mass\n")
    return tmp_path


def read(folder: Path, text: str, **options: object):
    (folder / "several.yaml").write_text(text)
    return read_source(SourceConfig("several", folder / "several.yaml", **options))


def test_two_sources_become_one_with_their_own_patients_and_labels(both):
    """The same number is two people; labels that a source lacks are missing, not absent."""
    source = read(both, TWO)
    assert source.classes[:4] == ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration"]
    assert source.classes[13:] == ["Hernia", "Fracture"]
    records = {record.path: record for record in source.records}
    assert list(records) == sorted(records)
    first, mass = records["nih/00000001_000.png"], records["clinic/1.png"]
    assert (first.patient, mass.patient) == ("chestxray14/00000001", "clinic:00000001")
    assert (first.source, mass.source) == ("ChestX-ray14", "images")
    assert (first.split, mass.split) == ("train+val", None)
    assert mass.label == "Fracture|Mass"
    assert first.missing == "Fracture"
    assert mass.missing.split("|") == [
        label for label in source.classes if label not in ("Mass", "Fracture", "Cardiomegaly")
    ]
    assert records["clinic/3.png"].patient == "image:clinic/3.png"
    assert records["nih/00000002_000.png"].label == "Mass|Hernia"
    assert ("clinic/2.png", "lateral view (--views)") in source.left_out
    assert ("clinic/map.yaml", "not in the table") in source.left_out
    assert source.num_found == len(source.records) + len(source.left_out)
    assert "nih: 4 images have no age from 0 to 120 years; left empty" in source.notes


def test_options_of_all_are_for_sources_without_their_own(both):
    """Views and empty cells; what a source lacks stays missing whatever empty cells count as."""
    text = TWO.replace("nih}", "nih, views: 'AP,PA'}")
    source = read(both, text, views="all", empty_cells="negative")
    assert source.views["nih"] == ("AP", "PA")
    assert len(source.views["clinic"]) == 6
    assert [r.path for r in source.records if r.view == "LATERAL"] == ["clinic/2.png"]
    assert all(record.missing for record in source.records)
    (both / "all.yaml").write_text("Fracture: null\nHernia: Mass\n")
    source = read(both, TWO, label_map=both / "all.yaml")
    assert "Fracture" not in source.classes
    assert "Hernia" not in source.classes
    mass = next(record for record in source.records if record.path == "clinic/1.png")
    assert mass.label == "Mass"


def test_sources_of_one_class_make_two(tmp_path):
    """A folder of one class each; folders of equal names are two sources for the audit."""
    for name in ("x/images/covid/1.png", "y/images/normal/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    text = "x: {source: folder, input: x/images}\ny: {source: folder, input: y/images}"
    source = read(tmp_path, text)
    assert source.classes == ["covid", "normal"]
    assert [record.source for record in source.records] == ["x/images", "y/images"]
    assert [record.missing for record in source.records] == ["", ""]


RSNA = """
nih: {source: chestxray14, input: nih, against_rest: Mass}
rsna: {source: csv, input: rsna.csv}
names: {source: folder, input: names, patient_pattern: '^([0-9]{8})_'}
"""


def test_patients_of_chestxray14_are_one_in_all_sets_that_know_their_number(both):
    """RSNA's X-rays are ChestX-ray14's: with the NIH's number they are joined, else it is said."""
    header = ("path", "label", "patient", "source")
    rows = [("a.png", "rest", "00000004", "RSNA"), ("b.png", "Mass", "00000003", "elsewhere")]
    write_csv(both / "rsna.csv", header, *rows)
    for name in ("names/Mass/00000003_001.png", "names/rest/00000004_009.png"):
        (both / name).parent.mkdir(parents=True)
        (both / name).touch()
    source = read(both, RSNA)
    patients = {record.path: record.patient for record in source.records}
    assert patients["nih/00000004_000.png"] == patients["rsna/a.png"] == "chestxray14/00000004"
    assert patients["names/Mass/00000003_001.png"] == patients["nih/00000003_000.png"]
    assert patients["rsna/b.png"] == "rsna:00000003"
    assert not any("is not known" in note for note in source.notes)
    write_csv(both / "rsna.csv", header, *rows, ("c.png", "Mass", "1f-2e", "RSNA"))
    assert (
        "nih, rsna, names contain X-rays of ChestX-ray14, and the patient of 1 of them is "
        "not known: equal images are found (--duplicates), but other images of one patient may be "
        "in two splits"
    ) in read(both, RSNA).notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the document: is null, expected an object"),
        ("{}", "lists no source"),
        ("x: folder", 'x: is "folder", expected an object'),
        ("x: {source: folder}", "x.input: is missing"),
        ("x: {source: folder, input: 3}", "x.input: is 3, expected text"),
        (
            "x: {source: fodler, input: x}",
            "x.source: is 'fodler', expected one of folder, csv, chestxray14",
        ),
        ("x: {source: several, input: x}", "x.source: is 'several', expected one of folder, csv"),
        (
            "x: {source: folder, input: x, size: 3}",
            "x.size: is not an option; expected one of source",
        ),
        ("x: {source: csv, input: x, allow_outside: 1}", "x.allow_outside: is 1, expected true or"),
        (
            "x: {source: csv, input: x, empty_cells: u}",
            "x.empty_cells: is \"u\", expected 'ignore'",
        ),
        ("x: {source: folder, input: 2020-01-01}", 'x.input: is "2020-01-01", expected text'),
        ("x: {source: folder, input: !!bool x}", "a value that does not fit its tag (!!)"),
        ("x: &x {source: folder, input: *x}", "holds more than 10000 values"),
        ("a/b: {source: folder, input: x}", "the name 'a/b', expected letters, digits"),
        ("1: {source: folder, input: x}", "the name 1, expected letters"),
        ("x: {source: folder, input: x}\nx: {source: csv, input: y}", "has the name 'x' twice"),
        ("x: {source: folder, input: x}\nX: {source: csv, input: y}", "differ in case only"),
        ("x: {source: folder, input: lost}", "x: --input"),
        ("x: {source: folder, input: x, views: side}", "x: --views side: 'SIDE' is not a view"),
        (
            "x: {source: folder, input: x, against_rest: Mass}",
            "x: --against-rest: works only with --source",
        ),
        (
            f"{TWO}\nf: {{source: folder, input: f}}",
            "f has one class per image, nih several labels, and one network learns one of the two; "
            "list the images of f in a table with the column labels (--source csv)",
        ),
    ],
)
def test_bad_lists_of_sources_are_refused_in_one_line(both, text, message):
    """With the file, the source, what was wrong and what was expected."""
    for name in ("f/a/1.png", "f/b/1.png"):
        (both / name).parent.mkdir(parents=True)
        (both / name).touch()
    with pytest.raises(CxrdistError, match=re.escape(message)) as caught:
        read(both, text)
    assert "several.yaml: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_of_one_source_are_not_for_all(both):
    """They would mean something else for each."""
    for option in ({"patient_pattern": "(.)"}, {"masks": both}, {"allow_outside": True}):
        with pytest.raises(
            CxrdistError, match=r"applies to a single source; give it for that source in .*yaml"
        ):
            read(both, TWO, **option)


def test_equal_numbers_in_the_tags_of_two_sources_are_two_patients(tmp_path):
    """Also with names that tell nothing, where both are kept apart by the pack and by a kill."""
    random = np.random.default_rng(0)
    for name in ("x", "y"):
        for i in range(8):
            (tmp_path / name / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (32, 32), dtype=np.uint8)
            file = tmp_path / name / "ab"[i % 2] / f"{i}.dcm"
            write_dicom(file, pixels, PatientID=f"ID{i}", ViewPosition="LL" if i > 5 else "PA")
    Image.fromarray(pixels).save(tmp_path / "x" / "a" / "8.png")
    (tmp_path / "several.yaml").write_text(
        "x: {source: folder, input: x, views: all}\ny: {source: folder, input: y}"
    )

    def config(out: str, **options: object) -> PackConfig:
        settings = {"size": 16, "split": "0.5/0.25/0.25", "workers": 1, "duplicates": "report"}
        return PackConfig(
            "several", tmp_path / "several.yaml", tmp_path / out, **settings, **options
        )

    pack(config("hidden"))
    hidden = read_index(tmp_path / "hidden").samples
    assert len(hidden) == 9 + 6
    assert len({sample.patient for sample in hidden}) == 15
    written = "".join(f.read_text("latin-1") for f in (tmp_path / "hidden").iterdir())
    assert not re.search(r"ID\d|several.yaml|x/a|y/b", written)
    pack(config("one", anonymise=False))
    with pytest.raises(CxrdistError, match="are not decoded yet"):
        pack(config("two", anonymise=False, merge=True))
    pack(config("two", anonymise=False, task=0, num_tasks=1))
    pack(config("two", anonymise=False, merge=True))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    lateral = {s.path for s in read_index(tmp_path / "one").samples if s.view == "LATERAL"}
    assert lateral == {"x/a/6.dcm", "x/b/7.dcm"}
