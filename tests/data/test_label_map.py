"""Label maps: several labels of a source become one, and labels are left out."""

import re
from itertools import product
from pathlib import Path

import pytest
from support import make_images

from cxrdist.config import PackConfig, SourceConfig
from cxrdist.data.findings import Finding
from cxrdist.data.index import read_index
from cxrdist.data.label_map import map_labels
from cxrdist.data.labels import labels_of
from cxrdist.data.pack import pack
from cxrdist.data.records import Record, Source
from cxrdist.data.sources import assume_absent, read_source
from cxrdist.errors import CxrdistError

STATES = ("label", "absent", "uncertain", "missing", "assumed_absent")
TABLE = "path,label\na.png,viral\nb.png,bacterial\nc.png,normal\nd.png,opacity\n"


def write_map(folder: Path, text: str) -> Path:
    file = folder / "map.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(("one", "other"), [*product(STATES, STATES)])
def test_two_labels_become_one_that_is_as_sure_as_they_are(tmp_path, one, other):
    """There if one is; else uncertain if one is; else missing if one is; else absent."""
    cells = {name: [] for name in STATES}
    cells[one].append("Pleural Other")
    cells[other].append("Effusion")
    del cells["absent"]
    known = {name: "|".join(labels) for name, labels in cells.items()}
    record = Record(Path("x"), "x", patient="p", source="s", **known)
    source = Source([record], "multilabel", ["Edema", "Pleural Other", "Effusion"], "s")
    mapped = map_labels(source, {"Pleural Other": "Pleura", "Effusion": "Pleura"}, "--label-map m")
    order = ("label", "uncertain", "missing", "assumed_absent", "absent")
    expected = min(one, other, key=order.index)
    assert mapped.classes == ["Edema", "Pleura"]
    found = {name: labels_of(getattr(mapped.records[0], name)) for name in known}
    assert found == {name: ["Pleura"] * (name == expected) for name in known}


def test_a_label_that_is_left_out_leaves_its_images_and_takes_its_findings(tmp_path):
    """Of several labels per image only the label goes; boxes have the new names."""
    findings = tuple(Finding(name, 1, 2, 3, 4) for name in ("Mass", "Nodule", "Scar"))
    record = Record(Path("x"), "x", "Mass|Nodule", "p", "s", findings=findings)
    source = Source([record], "multilabel", ["Mass", "Nodule", "Hernia"], "s")
    mapped = map_labels(source, {"Mass": None, "Nodule": "Lesion"}, "--label-map m")
    assert mapped.classes == ["Lesion", "Hernia"]
    assert mapped.records[0].label == "Lesion"
    assert [finding.label for finding in mapped.records[0].findings] == ["Lesion", "Scar"]
    assert mapped.left_out == ()


def read(folder: Path, text: str, **options: object) -> Source:
    for name in "abcd":
        (folder / f"{name}.png").touch()
    (folder / "t.csv").write_text(TABLE)
    return read_source(
        SourceConfig("csv", folder / "t.csv", label_map=write_map(folder, text), **options)
    )


def test_images_of_a_class_that_is_left_out_are_left_out_by_name(tmp_path):
    """Of one class per image; what the map does not name stays."""
    source = read(tmp_path, "viral: pneumonia\nbacterial: pneumonia\nopacity:\n")
    assert source.classes == ["pneumonia", "normal"]
    assert [r.label for r in source.records] == ["pneumonia", "pneumonia", "normal"]
    assert ("d.png", "class opacity (--label-map)") in source.left_out
    assert source.num_found == len(source.records) + len(source.left_out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "flu: pneumonia",
            "'flu' is not a label of t.csv, which has bacterial, normal, opacity, vir",
        ),
        ("", "the document: is null, expected an object"),
        ("{}", "is empty"),
        ("[viral]", "is a list, expected an object"),
        ("viral: [a]", "['a'] is not a text"),
        ("viral: 1", "1 is not a text; write it in quotes"),
        ("no: viral", "False is not a text; write it in quotes"),
        ("viral: a|b", "'a|b' is not a valid label"),
        ("viral: ' '", "' ' is not a valid label"),
        ("viral: a\nviral: b", "has the name 'viral' twice; keep one of them"),
        ("viral: !!python/object/new:os.system [ls]", "could not determine a constructor"),
        ("viral: &a [*a]", "holds more than 10000 values"),
        ("viral: Normal", "'Normal' and 'normal' are two spellings of one name"),
        ("{viral: , bacterial: , normal: , opacity: }", "drops all labels of t.csv"),
        ("{viral: , bacterial: , normal: x, opacity: x}", "found 1 class (x), expected at least 2"),
    ],
)
def test_bad_maps_are_refused_in_one_line(tmp_path, text, message):
    """With the file, what was wrong, and what was expected."""
    with pytest.raises(CxrdistError, match=re.escape(message)) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_another_map_is_another_pack_of_the_same_squares(tmp_path, capsys):
    """The same command knows its shards, a changed map does not; new names are counted.

    The counts of a recipe of the data set stay where a map is given beside it.
    """
    for folder, counts in (("viral", 8), ("normal", 8)):
        make_images(tmp_path / "in", {folder: counts}, seed=counts + len(folder))
    file, out = write_map(tmp_path, "viral: flu"), tmp_path / "out"
    settings = {"size": 16, "workers": 1, "split": "0.5/0.25/0.25", "duplicates": "report"}
    config = PackConfig(
        "folder",
        tmp_path / "in",
        out,
        label_map=file,
        expect={"flu": 8, "normal": 9, "viral": 7},
        **settings,
    )
    pack(config)
    assert read_index(out).classes == ["normal", "flu"]
    said = capsys.readouterr().out
    assert "unexpected count in in: normal has 8 images, expected 9\n" in said
    assert "flu has" not in said
    assert "viral has" not in said
    pack(config)
    assert "is packed already" in capsys.readouterr().out
    write_map(tmp_path, "viral: influenza\nnormal: flu")
    with pytest.raises(CxrdistError, match="already exists"):
        pack(config)


def test_a_missing_map_is_refused(tmp_path):
    """The file and the mend are named."""
    with pytest.raises(CxrdistError, match=r"lost.yaml: .*; expected THEIRS: OURS on each line"):
        read_source(SourceConfig("csv", tmp_path / "t.csv", label_map=tmp_path / "lost.yaml"))


def test_empty_cells_may_count_as_absent_and_are_known_as_such(tmp_path):
    """What is uncertain stays so; a source without empty cells says that nothing was done."""
    cells = {"uncertain": "b", "missing": "c|d", "assumed_absent": "e"}
    record = Record(Path("x"), "x", "a", "p", "s", **cells)
    source = assume_absent(Source([record], "multilabel", [*"abcde"], "s"))
    known = {name: getattr(source.records[0], name) for name in ("label", *cells)}
    assert known == {"label": "a", "uncertain": "b", "missing": "", "assumed_absent": "e|c|d"}
    assert source.notes == ()
    source = read(tmp_path, "viral: flu", empty_cells="negative")
    assert source.notes == ("--empty-cells negative: no image has an empty cell",)
