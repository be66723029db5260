import contextlib
import csv
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable

import numpy as np
import psutil
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import load_file, save_file
from support import run_ranks, small_disk, start_ranks

from cxrdist.config import (
    ExplainConfig,
    LocaliseConfig,
    Network,
    PredictConfig,
    ProbeTextConfig,
)
from cxrdist.data.index import read_index
from cxrdist.errors import CxrdistError, RunFailedError
from cxrdist.explain.export import explain
from cxrdist.explain.maps import decode
from cxrdist.explain.relevance import attribute
from cxrdist.explain.targets import choose_samples
from cxrdist.localise import localise
from cxrdist.model.densenet import Classifier, load_model, save_calibration, save_model
from cxrdist.model.description import Calibration
from cxrdist.predict import predict
from cxrdist.probe_text import probe_text

CLASSES = ["a", "b c", "d"]
FULL = "CXRDIST_FULL" in os.environ  # each world size, each form, five kills


@pytest.fixture
def run(tmp_path):
    """A run directory with a random model that has seen some images."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    network = Network(growth_rate=4, block_config=(2, 2, 2, 2))
    torch.manual_seed(0)
    model = Classifier(network, CLASSES, 32)
    model(torch.randint(0, 256, (16, 1, 32, 32), dtype=torch.uint8))
    save_model(model, tmp_path / "run" / "model")
    return tmp_path / "run"


def files_of(directory):
    return {
        file.relative_to(directory).as_posix(): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != ".lock"  # says who wrote last
    }


def kill_when(process: subprocess.Popen, reached: Callable[[], bool]) -> None:
    """SIGKILL a process with all its descendants as soon as something is seen to have happened."""
    while process.poll() is None and not reached():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.005)
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        for member in (*family, psutil.Process(process.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family)
    process.wait()


@pytest.mark.parametrize("form", ["npz", "webdataset"] if FULL else ["npz"])
@pytest.mark.parametrize("world", [1, 2, 3] if FULL else [3])
def test_ranks_and_kills_do_not_change_a_byte(shards, run, tmp_path, form, world):
    """Three ranks, killed when some files stand and started again, leave the files of one rank."""
    options = ("--cache", tmp_path / "cache", "--batch-size", 1, "--format", form)
    command = ("-m", "cxrdist", "explain", "--shards", shards, *options, "--run")
    done = run_ranks(1, *command, run)
    assert done.returncode == 0, done.stderr
    expected = files_of(run / "test")
    killed = shutil.copytree(run, tmp_path / "killed", ignore=shutil.ignore_patterns("test"))
    relevance, heatmaps = killed / "test" / "relevance", killed / "test" / "heatmaps"
    moments = random.Random(world).sample(range(1, 60), 5 if FULL else 1)
    inodes = {}
    for files in sorted(moments):
        process = start_ranks(world, *command, killed)
        kill_when(process, lambda: len(list(heatmaps.glob("*.png"))) >= files)  # noqa: B023
        assert all(file.stat().st_ino == inode for file, inode in inodes.items())
        inodes = {file: file.stat().st_ino for file in relevance.glob("[!.]*")}
        assert not (killed / "test" / "relevance.csv").exists()
    done = run_ranks(world, *command, killed)
    assert done.returncode == 0, done.stderr
    assert all(file.stat().st_ino == inode for file, inode in inodes.items())
    assert files_of(killed / "test") == expected
    maps = 18 if form == "npz" else 2
    means = len(list((run / "test" / "mean_maps").iterdir()))
    assert 1 <= means <= 3
    assert len(expected) == 2 + maps + 18 * 5 + means  # relevance.csv, relevance.json


@pytest.mark.parametrize("form", ["npz", "webdataset"])
def test_a_full_disk_is_one_line_and_the_maps_go_on_after_it(shards, run, tmp_path, form):
    """What was finished before stays; with room again the same command makes the rest."""
    options = {"shards": shards, "cache": tmp_path / "cache", "batch_size": 1, "format": form}
    explain(ExplainConfig(run, **options))
    with small_disk(tmp_path / "disk", "400k") as make_room:
        small = shutil.copytree(run, tmp_path / "disk" / "run", ignore=lambda *_: {"test"})
        with pytest.raises(RunFailedError, match="No space left on device; make room"):
            explain(ExplainConfig(small, **options))
        assert not [*small.rglob(".*.partial")]
        finished = {f: f.stat().st_ino for f in (small / "test" / "relevance").glob("*")}
        assert finished or form == "webdataset"
        make_room()
        explain(ExplainConfig(small, **options))
        assert all(file.stat().st_ino == inode for file, inode in finished.items())
        assert files_of(small / "test") == files_of(run / "test")


def test_what_was_made_otherwise_is_made_anew(shards, run, tmp_path):
    """The same command keeps each file, also of a model calibrated since; others keep none."""

    def explained(**options: object) -> dict[str, int]:
        explain(ExplainConfig(run, shards, cache=tmp_path / "cache", **options))
        files = (run / "test" / "relevance").iterdir()
        return {file.name: file.stat().st_mtime_ns for file in files}

    first = explained(limit=3)
    assert explained(limit=3) == first
    (run / "test" / "heatmaps" / f"{next(iter(first))[:-4]}.png").unlink()
    again = explained(limit=3)
    assert again.keys() == first.keys()
    assert again != first
    for options in ({"flat": False}, {"preset": "innvestigate"}):
        before, again = again, explained(limit=3, **options)
        assert again.keys() == before.keys()
        assert all(again[name] > before[name] for name in again)
    calibration = Calibration({"a": 2.0}, "youden", {"a": 0.0}, {}, 1, "0" * 64, 3, 3)
    save_calibration(calibration, run / "model")
    assert explained(limit=3, preset="innvestigate") == again, "no map depends on it"
    weights = load_file(run / "model" / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, run / "model" / "model.safetensors")
    before, again = again, explained(limit=3, preset="innvestigate")
    assert all(again[name] > before[name] for name in again)
    assert len(explained(limit=2)) == 2


def test_a_squeezenet_is_explained_as_a_densenet_is(shards, run, tmp_path):
    """The same files and columns, a ledger that closes, and its own blocks drawn anew."""
    torch.manual_seed(0)
    save_model(Classifier(Network(architecture="squeezenet1_1"), CLASSES, 32), run / "model")
    explain(ExplainConfig(run, shards, cache=tmp_path / "cache", limit=2))
    with open(run / "test" / "relevance.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        parts = (row[name] for name in ("relevance_sum", "bias_share", "epsilon_share"))
        assert float(row["logit"]) == pytest.approx(sum(map(float, parts)), abs=1e-5)
        assert (run / "test" / "heatmaps" / row["picture"]).is_file()
    info = json.loads((run / "test" / "relevance.json").read_text())
    first, second, last = (drawn["blocks"] for drawn in info["randomisation"]["drawn"])
    assert (first, second) == (["head"], ["fire9", "head"])
    assert last == ["stem", *(f"fire{number}" for number in range(2, 10)), "head"]


def test_a_network_without_rules_is_refused_by_all_that_explains(shards, run, tmp_path):
    """In one line that says which networks have rules, before anything is written."""
    save_model(Classifier(Network(architecture="convnext_atto"), CLASSES, 32), run / "model")
    before, cache = files_of(run), tmp_path / "cache"
    picture, out = tmp_path / "xray.png", tmp_path / "out.csv"
    Image.new("L", (40, 40), 90).save(picture)
    for command in (
        lambda: explain(ExplainConfig(run, shards, cache=cache)),
        lambda: localise(LocaliseConfig(run, shards, cache=cache)),
        lambda: probe_text(ProbeTextConfig(run, shards, boxes=tmp_path, cache=cache)),
        lambda: predict(PredictConfig(run, [picture], out, explain=True)),
    ):
        with pytest.raises(CxrdistError, match=r"cannot explain a ConvNeXt: .* resnet18, alexnet"):
            command()
    assert files_of(run) == before
    assert not out.exists()


def test_shards_of_maps_are_read_by_webdataset(shards, run, tmp_path):
    """The compact form holds the same maps to 2.5e-4 of the largest, and the same ledger."""
    settings = {"cache": tmp_path / "cache", "limit": 7, "batch_size": 1, "contrast": "d,a"}
    explain(ExplainConfig(run, shards, **settings))
    relevance = run / "test" / "relevance"
    exact = {f.stem: decode(f.stem, f.read_bytes()) for f in relevance.iterdir()}
    table = (run / "test" / "relevance.csv").read_bytes()
    explain(ExplainConfig(run, shards, **settings, format="webdataset", pictures=False))
    tars = [str(file) for file in sorted(relevance.iterdir())]
    read = webdataset.DataPipeline(
        webdataset.SimpleShardList(tars), webdataset.tarfile_to_samples()
    )
    found = {sample["__key__"]: decode(sample["__key__"], sample["npz"]) for sample in read}
    assert found.keys() == exact.keys()
    for key, one in found.items():
        assert one.classes == exact[key].classes == ["a", "b c", "d", "d minus a"]
        assert np.array_equal(one.ledger, exact[key].ledger)
        for values, reference in zip(one.relevance, exact[key].relevance, strict=True):
            assert np.abs(values - reference).max() <= 2.5e-4 * np.abs(reference).max()
    lines = (run / "test" / "relevance.csv").read_text().splitlines()
    rows = [line.rsplit(",", 1)[0] for line in table.decode().splitlines()]
    assert [line.rsplit(",", 1)[0] for line in lines] == rows
    assert not (run / "test" / "heatmaps").exists()


def test_a_contrast_is_the_difference_of_two_classes(shards, run, tmp_path):
    """Its map, each part of its ledger, its row and its picture are there."""
    explain(ExplainConfig(run, shards, limit=2, contrast="b c, a", cache=tmp_path / "cache"))
    for file in (run / "test" / "relevance").iterdir():
        found = decode(file.stem, file.read_bytes())
        a, b, _, contrast = found.relevance
        assert np.allclose(contrast, b - a, atol=1e-6 * np.abs(b).max())
        assert np.allclose(found.ledger[3], found.ledger[1] - found.ledger[0], atol=1e-5)
        assert (run / "test" / "heatmaps" / f"{file.stem}.b c minus a.png").is_file()
    with open(run / "test" / "relevance.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows[:4]] == ["a", "b c", "d", "b c minus a"]


def test_rules_without_a_ledger_leave_it_empty(shards, run, tmp_path):
    """With another composite the shares are empty, and nothing claims that they close."""
    settings = {"limit": 2, "cache": tmp_path / "cache", "composite": "epsilon_gamma_box"}
    explain(ExplainConfig(run, shards, **settings))
    with open(run / "test" / "relevance.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["bias_share"] + row["epsilon_share"] for row in rows} == {""}
    tests = json.loads((run / "test" / "relevance.json").read_text())
    assert tests["ledger_residual"] is None
    assert tests["pixel_flipping"]["images"] == 2


def test_relevance_is_tested_on_the_spot(shards, run, tmp_path, capsys):
    """relevance.json says how far the ledger closes, and what covering pixels does."""
    explain(ExplainConfig(run, shards, limit=9, cache=tmp_path / "cache"))
    tests = json.loads((run / "test" / "relevance.json").read_text())
    assert tests["ledger_residual"] < 1e-5
    flipping = tests["pixel_flipping"]
    assert flipping["images"] == 8
    assert flipping["relevant_first"][0] == flipping["random_order"][0] == 1
    printed = capsys.readouterr().out
    assert "ledger closed to" in printed
    # The loss with 20 % covered is at the end of the curve; the area is the mean on the way there.
    ends = [1 - flipping[order][-1] for order in ("relevant_first", "random_order")]
    assert f"covering 20% of an image takes {ends[0]:z.2f} of the probability" in printed
    assert f"go first, {ends[1]:z.2f} in random order" in printed
    assert f"{ends[0]:z.2f}" != f"{flipping['area_over_relevant_first']:z.2f}"


def test_the_files_hold_the_relevance_of_the_library(shards, run, tmp_path):
    """KEY.npz is what `attribute` gives, relevance.csv its ledger, and each map has its picture."""
    explain(ExplainConfig(run, shards, limit=4, classes="d,a", cache=tmp_path / "cache"))
    index = read_index(shards)
    by_key = {sample.key: i for i, sample in enumerate(index.samples)}
    with open(run / "test" / "relevance.csv") as file:
        rows = list(csv.DictReader(file))
    contrasts = [row for row in rows if " minus " in row["class"]]
    rows = [row for row in rows if row not in contrasts]
    assert [row["class"] for row in rows] == ["d", "a"] * 4
    assert len({index.samples[by_key[row["key"]]].label for row in rows}) == 3
    for contrast, *pair in zip(contrasts, rows[::2], rows[1::2], strict=True):
        first, second = sorted(pair, key=lambda row: -float(row["logit"]))
        assert contrast["class"] == f"{first['class']} minus {second['class']}"
        assert contrast["picture"] == f"{contrast['key']}.{contrast['class']}.png"
        assert (run / "test" / "heatmaps" / contrast["picture"]).is_file()
        for part in ("logit", "relevance_sum", "bias_share", "epsilon_share"):
            difference = float(first[part]) - float(second[part])
            assert float(contrast[part]) == pytest.approx(difference, abs=1e-6)
    for row in rows:
        with np.load(run / "test" / "relevance" / f"{row['key']}.npz") as data:
            assert data["classes"].tolist() == ["d", "a"]
            relevance = data["relevance"][["d", "a"].index(row["class"])]
        picture = Image.open(run / "test" / "heatmaps" / f"{row['key']}.png")
        image = torch.from_numpy(np.array(picture)).reshape(1, 1, 32, 32)
        expected = attribute(load_model(run), image, [row["class"]])
        assert relevance.dtype == np.float32
        assert np.allclose(relevance, expected.relevance[0, 0], atol=1e-5)
        parts = [float(row[n]) for n in ("relevance_sum", "bias_share", "epsilon_share")]
        assert sum(parts) == pytest.approx(float(row["logit"]), abs=1e-4)
        assert parts[0] == pytest.approx(float(relevance.sum()), abs=1e-4)
        assert Image.open(run / "test" / "heatmaps" / row["picture"]).size == (32, 32)


def test_a_limit_takes_the_classes_in_turn(shards):
    """Six of a split are two of each class, and no limit is all."""
    index = read_index(shards)
    labels = [index.samples[i].label for i in choose_samples(index, "test", 6)]
    assert sorted(labels) == ["a", "a", "b c", "b c", "d", "d"]
    assert choose_samples(index, "test", None).tolist() == index.numbers("test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": "a,x"}, "no class 'x'"),
        ({"contrast": "a"}, "expected two of a, b c, d"),
        ({"contrast": "a,a"}, "expected two of"),
        ({"contrast": "a,x"}, "no class 'x' in the model; expected one of a, b c, d"),
        ({"composite": "plus"}, "zennit has no 'plus'; expected one of canonical, epsilon_"),
        ({"preset": "innvestigate", "biases": False}, "leave out"),
    ],
)
def test_bad_options_are_refused(shards, run, tmp_path, options, message):
    """An unknown class or rule is refused before an image is decoded or anything is written."""
    with pytest.raises(CxrdistError, match=message):
        explain(ExplainConfig(run, shards, cache=tmp_path / "cache", **options))
    assert not (run / "test").exists()
    assert not (tmp_path / "cache").exists()
