"""An index of anybody: what it names and counts is bounded before it is used."""

import csv
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import RUN_CXRDIST, make_images, make_shards, run_measured

from cxrdist.cli import main
from cxrdist.config import Network, PackConfig
from cxrdist.data.index import Classes, read_index
from cxrdist.data.pack import pack
from cxrdist.documents import typed
from cxrdist.errors import CxrdistError
from cxrdist.model.densenet import Classifier, save_model

HUGE = 10**8


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("whole"), {"a": 12, "b": 12}, shard_size=4)


@pytest.fixture
def shards(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "shards"))


def change_index(shards: Path, path: str, value: object) -> None:
    """Set a field of index.json, such as splits.train.shards.0.name."""
    about = json.loads((shards / "index.json").read_text())
    *outer, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    holder = about
    for part in outer:
        holder = holder[part]
    holder[last] = value
    (shards / "index.json").write_text(json.dumps(about))


def change_samples(shards: Path, change) -> None:
    """Change the rows of samples.csv, and its hash in index.json."""
    with open(shards / "samples.csv", newline="") as file:
        rows = list(csv.reader(file))
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(change(rows))
    data = text.getvalue().encode("utf-8", "surrogatepass")
    (shards / "samples.csv").write_bytes(data)
    change_index(shards, "samples_sha256", hashlib.sha256(data).hexdigest())


FIRST = "splits.train.shards.0"
NAMES = [
    *("pipe:id>PWNED; cat train-000000.tar", "train-000000.tar|id", "file:train-000000.tar"),
    *("../shards/train-000000.tar", "/etc/passwd", "http://127.0.0.1:9/x.tar", "s3://a/b.tar"),
    *("train-000001.tar", "val-000000.tar", "train-000000.tar.gz", "train-{000000..9}.tar", ""),
    *("TRAIN-000000.tar", "train-000000.tar\n", f"train-{chr(0x660) * 6}.tar", "other-000000.tar"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_shard_has_the_name_that_pack_gives(shards, name):
    """Its own split and number; so it cannot be a command, a URL, or another's file."""
    change_index(shards, f"{FIRST}.name", name)
    with pytest.raises(CxrdistError, match=r"index\.json: names the shard .*train-000000\.tar"):
        read_index(shards)


def test_no_command_is_run_by_check_evaluate_and_train(shards, tmp_path, monkeypatch, capsys):
    """A shard that is named like a pipe, with the directory given as `.`: exit code 2, one line."""
    name = "pipe:id>PWNED; cat train-000000.tar"
    change_index(shards, f"{FIRST}.name", name)
    samples = (shards / "samples.csv").read_text().replace("train-000000.tar", name)
    (shards / "samples.csv").write_text(samples)
    change_index(shards, "samples_sha256", hashlib.sha256(samples.encode()).hexdigest())
    (tmp_path / "run" / "model").mkdir(parents=True)
    save_model(Classifier(Network(4, (2, 2, 2, 2)), ["a", "b"], 32), tmp_path / "run" / "model")
    monkeypatch.chdir(shards)
    for command in (
        ["check", "."],
        ["evaluate", "--run", "../run", "--shards", "."],
        ["explain", "--run", "../run", "--shards", "./"],
        ["train", "--config", "demo", "--run", "../new", "--shards", "./"],
    ):
        assert main(command) == 2
        assert "names the shard" in capsys.readouterr().err
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.parametrize("place", [".", "./", "../shards", "data:v2", "a b", "pipe:x", "file:x"])
def test_a_directory_may_have_any_name(shards, place, monkeypatch, tmp_path, capsys):
    """Also relative, with a colon, or like a URL's scheme."""
    from accelerate import Accelerator

    from cxrdist.data.cache import open_cache

    monkeypatch.chdir(shards)
    if not Path(place).exists():
        Path(place).mkdir()
        for file in shards.glob("*.*"):
            shutil.copy(file, place)
    images = open_cache(read_index(Path(place)), tmp_path / "cache", Accelerator(cpu=True))
    assert images.shape == (24, 32, 32)


FIELDS = [
    *((f"{FIRST}.samples", value) for value in (HUGE, 10**12, -1, 0, 1.0, True, "4", None)),
    *((f"{FIRST}.bytes", value) for value in (-1, 2**70, "1", None)),
    *((f"{FIRST}.sha256", value) for value in (None, 5, "0" * 64)),
    *(("image_size_px", value) for value in (10**9, 0, -32, 32.0, "32", True, 31, 64)),
    *(("classes", value) for value in ("ab", ["a", "a"], ["a", ""], ["a|b"], {"a": 1}, [["a"]])),
    *(("task", value) for value in ("evil", ["multiclass"], 1, "multilabel ")),
    *(("fit", value) for value in ("evil", None, {})),
    *(("cover", value) for value in ("x", {"split": "test"}, {"how": 1})),
    *(("splits", value) for value in (None, [], {"train": {}})),
    *(("splits.val", value) for value in ([], {"shards": {}}, {"shards": [1]})),
    *(("splits.val.classes", value) for value in ({"a": HUGE, "b": 1}, [], {"a": "x"}, None)),
    *(("format", value) for value in ("cxrdist-shards-9", None, ["cxrdist-shards-1"])),
    ("samples_sha256", 7),
    ("split", ["x"]),
]


@pytest.mark.parametrize(("path", "value"), FIELDS)
def test_fields_have_their_types_and_bounds(shards, path, value):
    """What differs is one line that names the file."""
    from accelerate import Accelerator

    from cxrdist.data.cache import open_cache

    change_index(shards, path, value)
    with pytest.raises(CxrdistError, match=r"index\.json|samples\.csv|\.tar: "):
        open_cache(read_index(shards), shards.parent / "cache", Accelerator(cpu=True))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_each_split_is_in_the_index(shards, split):
    """One without images has no shards, and is there all the same."""
    splits = json.loads((shards / "index.json").read_text())["splits"]
    del splits[split]
    change_index(shards, "splits", splits)
    with pytest.raises(CxrdistError, match=rf"index\.json: splits\.{split}: is missing"):
        read_index(shards)


@pytest.mark.parametrize("name", ["\x1b[31ma", "a\nb", "a\r", "\x9b1m", "\x7f"])
def test_a_class_cannot_command_a_terminal(name):
    """Escape sequences and ends of lines are in no name; other letters are."""
    assert typed(["肺炎", "é, <b>"], Classes) == ["肺炎", "é, <b>"]
    with pytest.raises(ValueError, match="without control characters"):
        typed([name], Classes)


def test_fields_of_newer_versions_are_left_alone(shards):
    """More fields in index.json and more columns in samples.csv are no fault."""
    change_index(shards, "depth", 12)
    change_index(shards, f"{FIRST}.crc", "x")
    change_samples(shards, lambda rows: [[*row, "x"] for row in rows])
    assert len(read_index(shards).samples) == 24


def test_a_directory_of_links_is_read(shards, tmp_path):
    """As data sets of git-annex and the Hugging Face hub are; a file too large is not read."""
    (tmp_path / "links").mkdir()
    for file in shards.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert read_index(tmp_path / "links").samples == read_index(shards).samples
    with open(shards / "index.json", "ab") as file:
        file.truncate(9 << 20)
    with pytest.raises(CxrdistError, match=r"index\.json: has 9437184 bytes, expected at most"):
        read_index(tmp_path / "links")


CELLS = {
    "key": ("../../../x", "a.b", "", "k" * 91, "a/b", "é"),
    "split": ("evil", "", "TRAIN"),
    "shard": ("pipe:id", "train-000009.tar"),
    "label": ("c", "", "a|b", "a|a"),
    "sha256": ("", "x", "G" * 64, "A" * 64),
    "uncertain": ("b", "c"),
    "missing": ("b",),
    "view": ("sideways", "pa"),
    "assumed_absent": ("b",),
}


@pytest.mark.parametrize(("column", "value"), [(c, v) for c, vs in CELLS.items() for v in vs])
def test_cells_of_the_table_have_their_form(shards, column, value):
    """A key that leaves the directory, a label of no class, a hash that is none."""

    def change(rows):
        rows[1][rows[0].index(column)] = value
        return rows

    change_samples(shards, change)
    with pytest.raises(CxrdistError, match=r"samples\.csv"):
        read_index(shards)


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    """Shards of the labels x, y and z, none of them stated for all images."""
    folder = make_images(tmp_path_factory.mktemp("several") / "in", {"i": 24})
    cells = ("1,0,", "U,1,1", "-1.0,,0")
    rows = [
        f"i/{f.name},{f.stem[:-2]},{cells[i % 3]}"
        for i, f in enumerate(sorted(folder.rglob("*.png")))
    ]
    (folder / "t.csv").write_text("\n".join(["path,patient,x,y,z", *rows]))
    options = {"size": 32, "split": "0.5/0.25/0.25", "workers": 1}
    pack(PackConfig("csv", folder / "t.csv", folder.parent / "shards", **options))
    return folder.parent / "shards"


def test_targets_are_what_the_table_says(several):
    """1, 0, -1 for uncertain and -2 for missing, int8."""
    index = read_index(several)
    names = sorted(sample.path for sample in index.samples)
    known = {0: [1, 0, -2], 1: [-1, 1, 1], 2: [-1, -2, 0]}
    assert index.targets().dtype == np.int8
    assert index.targets().tolist() == [known[names.index(s.path) % 3] for s in index.samples]
    counts = index.counts()
    for name, what, expected in (("x", "uncertain", 16), ("y", "missing", 8), ("z", "missing", 8)):
        assert sum(counts[split][name][what] for split in counts) == expected
        assert {counts[split][name]["assumed_absent"] for split in counts} == {0}


NOT_STATED = [
    *(("uncertain", text) for text in ("x", "y|y", "w", "z|")),
    *(("missing", text) for text in ("x", "x|z", "|")),
    *(("assumed_absent", text) for text in ("x", "z", "w", "y|y")),
]


@pytest.mark.parametrize(("column", "text"), NOT_STATED)
def test_a_label_is_of_a_class_and_in_one_column(several, tmp_path, column, text):
    """In a row with x where z is missing: no label twice, no label without a class."""
    shards = Path(shutil.copytree(several, tmp_path / "shards"))

    def change(rows):
        row = next(row for row in rows if row[rows[0].index("label")] == "x")
        row[rows[0].index(column)] = text
        return rows

    change_samples(shards, change)
    with pytest.raises(CxrdistError, match=r"samples\.csv: .*(is not a class|is in two of)"):
        read_index(shards)


TABLES = {
    "a row too many": lambda rows: [*rows, rows[-1]],
    "a row missing": lambda rows: rows[:-1],
    "a short row": lambda rows: [*rows[:-1], rows[-1][:3]],
    "no rows": lambda rows: [],
    "other columns": lambda rows: [rows[0][::-1], *rows[1:]],
    "a long field": lambda rows: [*rows[:-1], [*rows[-1][:6], "x" * 200_000, rows[-1][7]]],
    "half a surrogate": lambda rows: [*rows[:-1], [*rows[-1][:6], "\ud800", rows[-1][7]]],
    "another order": lambda rows: [rows[0], *rows[:0:-1]],
}


def test_samples_in_another_order_are_not_called_too_few(shards):
    change_samples(shards, TABLES["another order"])
    with pytest.raises(CxrdistError, match=r"samples\.csv: lists the samples in another order"):
        read_index(shards)


@pytest.mark.parametrize("change", TABLES.values(), ids=TABLES)
def test_a_table_that_is_none_is_one_line(shards, change):
    """Rows too many are not read, and a field without an end neither."""
    change_samples(shards, change)
    with pytest.raises(CxrdistError, match=r"samples\.csv: "):
        read_index(shards)


@pytest.mark.parametrize("path", ["index.json", "samples.csv"])
def test_a_number_of_samples_costs_no_memory(shards, path):
    """10^8 samples in index.json, and a table of one endless line."""
    if path == "index.json":
        change_index(shards, f"{FIRST}.samples", 10**7)
    else:
        with open(shards / path, "wb") as file:
            file.truncate(1 << 29)
    done = run_measured(RUN_CXRDIST, "check", shards)
    assert done.code == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "samples" in done.stderr
    assert done.mib < 512
