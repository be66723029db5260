import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from cxrdist.config import PackConfig
from cxrdist.data.pack import pack
from cxrdist.data.rsna_pneumonia import MAPPING
from cxrdist.data.sources import read_source
from cxrdist.errors import CxrdistError

RSNA = [f"{i:08x}-2dea-4038-8d4d-458db30ed8d{i}" for i in range(4)]
BIMCV = "sub-S03044_ses-E06138_run-1_bp-chest_vp-ap_cr-corrected.png"
# Lines as in CXR-4; two files of Cohen differ in their suffix alone, two patients have one number.
CURRENT = {
    "train": f"""191 67d668e570c242404ba82c7cbe2ca8f2-05be-0.jpg positive cohen
191 67d668e570c242404ba82c7cbe2ca8f2-0015-0.jpg positive cohen
COVID-00024 COVID-00024.jpg positive fig1
173 000001-3.png negative cohen
173 000001-3.jpg positive cohen
7 seven.jpeg negative cohen
{RSNA[0]} {RSNA[0]}.png negative rsna
{RSNA[1]} {RSNA[1]}.png negative rnsa
COVID 216 COVID(216).png positive sirm
""",
    "val": f"""S03044 {BIMCV} positive bimcv
7 seven.png negative actmed
{RSNA[2]} {RSNA[2]}.png negative rsna
""",
    "test": f"""419639-003251 MIDRC-RICORD-1C-419639-003251-46647-0.png positive ricord
{RSNA[3]} {RSNA[3]}.png negative rsna
""",
}
# Of the older form: three classes, no val; ANON191 is in both lists, some lines lack the source.
OLDER = {
    "train": """3 SARS-10.1148rg.242035193-g04mr34g0-Fig8a-day0.jpeg pneumonia cohen
COVID 1 COVID(1).png COVID-19 sirm
ANON191 CR.1.2.840.113564.1722810170.20200318153359046380.1003000225002.png normal actmed
""",
    "test": f"""{RSNA[0]} {RSNA[0]}.png normal
31 streptococcus-pneumoniae-pneumonia-temporal-evolution-1-day3.jpg pneumonia
ANON191 CR.1.2.840.113564.1722810170.20200406103252100.1003000225002.png COVID-19 actmed
""",
}


def write_set(folder: Path, lists: dict[str, str], form: str = "{}.txt") -> Path:
    """The lists, and for each line an image."""
    for split, text in lists.items():
        (folder / split).mkdir(parents=True)
        (folder / form.format(split)).write_text(text)
        for line in text.splitlines():
            name = next(word for word in line.split() if word[-4:] in (".png", ".jpg", "jpeg"))
            (folder / split / name).touch()
    return folder


def read(folder: Path):
    return read_source(PackConfig("covidx", folder, Path("out")))


def test_the_current_lists_give_splits_sources_and_patients(tmp_path):
    """Official splits; a number is a patient of its collection; RSNA has one name."""
    source = read(write_set(tmp_path, CURRENT))
    assert (source.task, source.classes) == ("multiclass", ["negative", "positive"])
    images = {record.path: record for record in source.records}
    assert Counter((record.split, record.label) for record in source.records) == {
        ("train", "negative"): 4,
        ("train", "positive"): 2,
        ("val", "negative"): 2,
        ("val", "positive"): 1,
        ("test", "negative"): 1,
        ("test", "positive"): 1,
    }
    assert images["train/seven.jpeg"].patient == "covid-chestxray-dataset/7"
    assert images["val/seven.png"].patient == "Actualmed/7"
    assert images["train/000001-3.png"].label == "negative"
    assert images["train/000001-3.jpg"].label == "positive"
    assert images["train/COVID(216).png"].patient == "COVID-19 Radiography Database/COVID 216"
    assert images[f"val/{BIMCV}"].view == "AP"
    assert Counter(record.source for record in source.records) == {
        "RSNA": 4,
        "covid-chestxray-dataset": 3,
        "Actualmed": 1,
        "COVID-19 Radiography Database": 1,
        "BIMCV": 1,
        "RICORD": 1,
    }
    assert source.num_found == len(source.records) + len(source.left_out) == 14 + 3


def test_the_two_patients_of_the_missing_comma_do_not_train(tmp_path):
    """191 and COVID-00024 are left out by name, and a note says so; in test they would stay."""
    source = read(write_set(tmp_path / "published", CURRENT))
    reason = "of a patient whom COVID-Net meant for test, and a missing comma put into train"
    assert [left.path for left in source.left_out if left.reason == reason] == [
        "train/67d668e570c242404ba82c7cbe2ca8f2-0015-0.jpg",
        "train/67d668e570c242404ba82c7cbe2ca8f2-05be-0.jpg",
        "train/COVID-00024.jpg",
    ]
    (note,) = (note for note in source.notes if "comma" in note)
    assert "3 (Figure1/COVID-00024, covid-chestxray-dataset/191)" in note
    line = "COVID-00024 COVID-00024.jpg positive fig1\n"
    mended = {
        "train": CURRENT["train"].replace(line, ""),
        "val": CURRENT["val"],
        "test": CURRENT["test"] + line,
    }
    source = read(write_set(tmp_path / "mended", mended))
    assert "test/COVID-00024.jpg" in {record.path for record in source.records}


def test_older_lists_have_three_classes_and_leave_val_to_be_drawn(tmp_path):
    """Lists without a source, and a patient of both lists, who stays in test."""
    source = read(write_set(tmp_path, OLDER, "{}_COVIDx9A.txt"))
    assert source.classes == ["normal", "pneumonia", "COVID-19"]
    assert Counter((record.split, record.label) for record in source.records) == {
        ("train+val", "pneumonia"): 1,
        ("train+val", "COVID-19"): 1,
        ("test", "normal"): 1,
        ("test", "pneumonia"): 1,
        ("test", "COVID-19"): 1,
    }
    images = {Path(record.path).name[:8]: record for record in source.records}
    assert images[RSNA[0][:8]].source == "RSNA"
    assert images["streptoc"].source == "COVIDx"
    (left,) = (left for left in source.left_out if left.reason != "not an image")
    assert left.path.startswith("train/CR.1.2")
    assert left.reason == "of a patient who is in the test list too"
    assert any("test list too: 1 (Actualmed/ANON191)" in note for note in source.notes)


def test_patients_of_rsna_are_the_nihs_where_its_mapping_is_there(tmp_path):
    """Then images of one patient under two names, one of them in test, do not train."""
    folder = write_set(tmp_path, CURRENT)
    assert any("RSNA's 4 images" in note for note in read(folder).notes)
    entries = [
        {"subset_img_id": name, "img_id": f"{i % 3 + 5:08d}_000.png"} for i, name in enumerate(RSNA)
    ]
    (folder / MAPPING).write_text(json.dumps(entries))
    source = read(folder)
    left = {left.path: left.reason for left in source.left_out}
    assert left[f"train/{RSNA[0]}.png"] == "of a patient who is in the test list too"
    assert {r.patient for r in source.records if r.source == "RSNA"} == {
        *("RSNA/00000005", "RSNA/00000006", "RSNA/00000007")
    }
    assert not any("RSNA's" in note for note in source.notes)


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        (
            "7 seven.jpeg negative cohen",
            "7 seven.jpeg level2 cohen",
            "line 6: '7 seven.jpeg level2",
        ),
        ("7 seven.jpeg negative cohen", "seven.jpeg negative", "line 6: 'seven.jpeg negative'"),
        (
            "7 seven.jpeg negative",
            "7 seven.jpeg pneumonia",
            "the lists mix negative, pneumonia, po",
        ),
        (
            "7 seven.jpeg",
            "7 000001-3.png",
            r"line 6: differs from the earlier line of 000001-3\.png, negative",
        ),
    ],
)
def test_a_malformed_line_is_named(tmp_path, before, after, fault):
    """Its number, and what was expected."""
    folder = write_set(tmp_path, CURRENT)
    assert before in CURRENT["train"]
    (folder / "train.txt").write_text(CURRENT["train"].replace(before, after))
    with pytest.raises(CxrdistError, match=fault):
        read(folder)


def test_lists_of_one_version_are_asked_for(tmp_path):
    """Without lists, and with those of two versions; what a list lacks and what is not here."""
    folder = write_set(tmp_path, CURRENT)
    (folder / "train_COVIDx9B.txt").write_text(CURRENT["train"])
    (folder / "competition_test").mkdir()
    (folder / "competition_test" / "1.png").touch()
    (folder / "train" / "stray.png").touch()
    (folder / "train" / "seven.jpeg").unlink()
    (folder / "train.txt").write_text(CURRENT["train"] + CURRENT["train"])  # as COVIDx 1 has it
    source = read(folder)
    left = {left.path: left.reason for left in source.left_out}
    assert left["competition_test/1.png"] == "outside of the data set's folders"
    assert left["train/stray.png"] == "not in the table"
    assert left["train/seven.jpeg"] == "in the table, but not here"
    assert "1 images of train.txt and val.txt and test.txt are not here" in source.notes
    (folder / "test_COVIDx9B.txt").write_text(CURRENT["test"])
    with pytest.raises(CxrdistError, match=r"has train\.txt and train_COVIDx9B\.txt; leave"):
        read(folder)
    for file in folder.glob("*.txt"):
        file.unlink()
    with pytest.raises(CxrdistError, match=r"has no train\.txt and test\.txt; expected the lists"):
        read(folder)


def test_a_pack_keeps_the_official_splits(tmp_path):
    """Each sample in its list's split; the audit counts what CheXNet has seen."""
    folder = write_set(tmp_path / "covidx", CURRENT)
    for number, file in enumerate(sorted(folder.glob("*/*"))):
        Image.effect_noise((48, 40 + number), 80).convert("L").save(file)
    out = tmp_path / "shards"
    pack(PackConfig("covidx", folder, out, size=32, workers=1, duplicates="report"))
    with open(out / "samples.csv", newline="") as file:
        samples = list(csv.DictReader(file))
    assert len(samples) == 11
    assert all(sample["path"].startswith(f"{sample['split']}/") for sample in samples)
    audit = json.loads((out / "audit.json").read_text())
    seen = {name: counts["all"] for name, counts in audit["in_pre_training"]["splits"].items()}
    assert seen == {"train": 2, "val": 1, "test": 1}
