"""Views by tag, table and name: which are packed, which are left out, and what is said."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_dicom
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from support import contents

from cxrdist.config import PackConfig, SourceConfig
from cxrdist.data.images import decode
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.data.sources import read_source
from cxrdist.data.views import parse_views, view_in_name, view_of
from cxrdist.errors import CxrdistError

# Values of the data sets' own columns, each with what it means.
VOCABULARIES = {
    "MIMIC-CXR ViewPosition": {
        "AP": "AP",
        "PA": "PA",
        "LATERAL": "LATERAL",
        "LL": "LATERAL",
        "XTABLE LATERAL": "LATERAL",
        **dict.fromkeys(("AP AXIAL", "AP LLD", "AP RLD", "PA LLD", "PA RLD"), "OTHER"),
        **dict.fromkeys(("LAO", "RAO", "LPO", "SWIMMERS"), "OTHER"),
        "": "",
    },
    "PadChest Projection": {
        "PA": "PA",
        "L": "LATERAL",
        "AP": "AP",
        "AP_horizontal": "AP",
        "COSTAL": "OTHER",
        "EXCLUDE": "OTHER",
    },
    "CheXpert Frontal/Lateral and AP/PA": {
        "Frontal": "FRONTAL",
        "Lateral": "LATERAL",
        "LL": "LATERAL",
        "RL": "LATERAL",
    },
    "covid-chestxray-dataset view": {
        **dict.fromkeys(("AP", "AP Supine", "AP semi erect", "AP Erect"), "AP"),
        "PA": "PA",
        "L": "LATERAL",
        **dict.fromkeys(("Axial", "Coronal"), "OTHER"),
    },
    "DICOM View Position, CR": {
        **dict.fromkeys(("LL", "RL"), "LATERAL"),
        **dict.fromkeys(("RLD", "LLD", "RLO", "LLO"), "OTHER"),
    },
    "DICOM view codes, CID 4010": {
        "postero-anterior": "PA",
        "antero-posterior": "AP",
        "frontal": "FRONTAL",
        **dict.fromkeys(("lateral", "left lateral", "right lateral"), "LATERAL"),
        **dict.fromkeys(("oblique", "postero-anterior oblique", "right anterior oblique"), "OTHER"),
    },
    "missing values": dict.fromkeys((" ", "nan", "N/A", "Unknown", "UNK", "-", "None"), ""),
    "no view, or two": dict.fromkeys(("CHEST", "L5 S1", "7", "PA and lateral", "PA/LAT")),
    "one of two": {"AP/PA": "FRONTAL", "PA or AP": "FRONTAL"},
}
NAMES = {
    **dict.fromkeys(
        ("view2_lateral.jpg", "Lateral1.png", "a-LAT.png", "x_vp-ll_cr.png"), "LATERAL"
    ),
    **dict.fromkeys(("1_PA.png", "frontal PA.png", "x_vp-pa_cr.png"), "PA"),
    "covid-15-AP.png": "AP",
    "view1_frontal.jpg": "FRONTAL",
    "left_lateral_decubitus.png": "OTHER",
    **dict.fromkeys(("bilateral.png", "PA017.png", "pa.png", "LATE.png", "PA-lateral.png"), ""),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_words_of_real_data_sets_are_known(name):
    """Each value of their columns is the view that their papers and manuals say it is."""
    expected = VOCABULARIES[name]
    assert {text: view_of(text) for text in expected} == expected


def test_only_whole_words_of_a_name_tell_a_view():
    """Upper case for short words; a name that tells two views tells none."""
    assert {name: view_in_name(name) for name in NAMES} == NAMES


def test_views_are_chosen_by_name():
    """Any case; all; a word that is not a view is refused with the list."""
    assert parse_views(None) == ("PA", "AP", "FRONTAL", "")
    assert parse_views("pa, UNKNOWN,pa") == ("PA", "")
    assert len(parse_views("all")) == 6
    for text in ("PA,side", "", "PA,,AP", "all,PA"):
        with pytest.raises(
            CxrdistError, match=f"--views {text}: .* is not a view; expected PA, AP"
        ):
            parse_views(text)


def test_the_view_of_a_dicom_is_its_view_position_or_its_view_code(tmp_path):
    """A position that names no view gives way to the code; what names none of them is None."""

    def view(position, meaning=None):
        tags = {"ViewPosition": position}
        if meaning is not None:
            code = Dataset()
            code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "R-1", "SRT", meaning
            tags["ViewCodeSequence"] = Sequence([code])
        file = write_dicom(tmp_path / "a.dcm", np.arange(64).reshape(8, 8), **tags)
        return decode(file, 8, "crop").view

    assert view("LL") == "LATERAL"
    assert view("", "postero-anterior") == "PA"
    assert view("CHEST", "left lateral") == "LATERAL"
    assert view("AP", "lateral") == "AP"
    assert view("CHEST") is None
    assert view("") == view(None) == ""


@pytest.fixture(scope="module")
def views(tmp_path_factory) -> Path:
    """A table and images whose view only the table, only a tag, only the name, or nothing tells.

    Four of each kind and class; DICOM files of which a tag and the name or the table disagree.
    """
    folder = tmp_path_factory.mktemp("views")
    random = np.random.default_rng(0)
    rows = []

    def add(name: str, label: str, view: str = "", tag: str | None = None) -> None:
        pixels = random.integers(0, 256, (40, 40), dtype=np.uint8)
        if tag is None:
            Image.fromarray(pixels).save(folder / name)
        else:
            write_dicom(folder / name, pixels, ViewPosition=tag, PatientID=name)
        rows.append((name, label, view, name))

    for label in "ab":
        for i in range(4):
            add(f"{label}{i}.png", label)
            add(f"{label}{i}-table.png", label, "Lateral")
            add(f"{label}{i}-PA.png", label)
            add(f"{label}{i}-lateral.png", label)
            add(f"{label}{i}.dcm", label, "", "LL")
            add(f"{label}{i}-lateral.dcm", label, "", "AP")
            add(f"{label}{i}-told.dcm", label, "PA", "RL")
            add(f"{label}{i}-oblique", label, "", "")
    add("a-strange.png", "a", "chest xray")
    add("a-strange.dcm", "a", "", "THORAX")
    with open(folder / "images.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "view", "patient"), *rows])
    return folder


def config_of(folder: Path, out: Path, **options: object) -> PackConfig:
    settings = {"size": 16, "split": "0.5/0.25/0.25", "workers": 1, "anonymise": False}
    return PackConfig("csv", folder / "images.csv", out, **{**settings, **options})


def test_lateral_images_are_left_out_by_table_tag_and_name(views, tmp_path, capsys):
    """Frontal and unknown ones are packed, the rest stands in rejected.csv with its view."""
    pack(config_of(views, tmp_path / "out"))
    index = read_index(tmp_path / "out")
    kinds = Counter((s.path.lstrip("ab0123"), s.view) for s in index.samples)
    assert kinds == {
        (".png", ""): 8,
        ("-PA.png", "PA"): 8,
        ("-lateral.dcm", "AP"): 8,
        ("-told.dcm", "PA"): 8,
        ("-strange.png", ""): 1,
        ("-strange.dcm", ""): 1,
    }
    with open(tmp_path / "out" / "rejected.csv", newline="") as file:
        left = Counter((path.lstrip("ab0123"), reason) for path, reason in csv.reader(file))
    assert left == {
        ("path", "reason"): 1,
        ("images.csv", "the table itself"): 1,
        ("-table.png", "lateral view (--views)"): 8,
        ("-lateral.png", "lateral view (--views)"): 8,
        (".dcm", "lateral view (--views)"): 8,
        ("-oblique", "other view (--views)"): 8,
    }
    said = capsys.readouterr().out
    for line in (
        "views: 16 PA, 10 unknown, 8 AP\n",
        "'chest xray'; it is left empty\n",
        "1 DICOM files have a view tag that cxrdist does not know\n",
        "8 images have different views in the table and in their tag; the table's is used\n",
        "left out: lateral view (--views)  24\n",
        "left out: other view (--views)    8\n",
    ):
        assert line in said
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert audit["views"]["counts"] == {
        "AP": {"a": 4, "b": 4, "all": 8},
        "PA": {"a": 8, "b": 8, "all": 16},
        "unknown": {"a": 6, "b": 4, "all": 10},
    }


def test_the_chosen_views_are_the_same_for_tasks_as_for_one_process(views, tmp_path):
    """Also with names that tell nothing; lateral images alone are packed if asked for."""
    one, other = tmp_path / "one", tmp_path / "other"
    pack(config_of(views, one, views="LATERAL"))
    for task in (0, 1):
        pack(config_of(views, other, views="LATERAL", task=task, num_tasks=2))
    pack(config_of(views, other, views="LATERAL", merge=True))
    assert contents(one) == contents(other)
    assert {sample.view for sample in read_index(one).samples} == {"LATERAL"}
    pack(config_of(views, tmp_path / "hidden", views="LATERAL", anonymise=True))
    hidden, shown = ((d / "rejected.csv").read_text() for d in (tmp_path / "hidden", one))
    assert len(read_index(tmp_path / "hidden").samples) == len(read_index(one).samples) == 24
    assert [Counter(r for _, r in csv.reader(text.splitlines())) for text in (hidden, shown)] == [
        Counter(r for _, r in csv.reader(shown.splitlines()))
    ] * 2


def test_a_class_of_lateral_images_only_is_not_lost_in_silence(views, tmp_path):
    """By table or name before anything is decoded, by tag afterwards."""
    table = tmp_path / "images.csv"
    rows = [f"{views}/a{i}.png,a,,a{i}" for i in range(4)]
    for name, message in (
        ("-table.png", "has no image of class 'b' of the views that are packed .PA, AP, frontal"),
        (".dcm", r"class 'b' has no image left; .* first .*b0.dcm: lateral view \(--views\)"),
    ):
        lines = [f"{views}/b{i}{name},b,{'L' * (name != '.dcm')},b{i}" for i in range(4)]
        table.write_text("\n".join(["path,label,view,patient", *rows, *lines]))
        with pytest.raises(CxrdistError, match=message):
            pack(
                PackConfig(
                    "csv",
                    table,
                    tmp_path / "out",
                    size=16,
                    workers=1,
                    allow_outside=True,
                    anonymise=False,
                    split="0.5/0.25/0.25",
                )
            )


def test_the_folder_of_an_image_tells_no_view(tmp_path):
    """It may be a class: `lateral/1.png` is packed, `a/lateral.png` is not."""
    for name in ("lateral/1.png", "lateral/2.png", "a/1.png", "a/lateral.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    source = read_source(SourceConfig("folder", tmp_path))
    assert [record.path for record in source.records] == [
        "a/1.png",
        "lateral/1.png",
        "lateral/2.png",
    ]
    assert source.left_out == (("a/lateral.png", "lateral view (--views)"),)
    assert len(read_source(SourceConfig("folder", tmp_path, views="all")).records) == 4
