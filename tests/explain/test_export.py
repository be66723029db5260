import csv

import numpy as np
import pytest
import torch
from PIL import Image
from support import run_ranks

from cxrdist.config import ExplainConfig, Network
from cxrdist.data.index import read_index
from cxrdist.errors import CxrdistError
from cxrdist.explain.export import choose_samples, explain, picture_name
from cxrdist.explain.relevance import attribute
from cxrdist.model.densenet import Classifier, load_model, save_model

CLASSES = ["a", "b c", "d"]


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
        if file.is_file()
    }


def test_files_are_the_same_bytes_for_any_number_of_ranks(shards, run, tmp_path):
    """Five images in batches of two over three ranks give the files of one rank."""
    command = ("-m", "cxrdist", "explain", "--run", run, "--shards", shards, "--limit", 5)
    found = []
    for world in (1, 3):
        done = run_ranks(world, *command, "--cache", tmp_path / "cache", "--batch-size", 2)
        assert done.returncode == 0, done.stderr
        found.append(files_of(run / "test"))
    assert found[0] == found[1]
    assert len(found[0]) == 1 + 5 + 5 * 4


def test_the_files_hold_the_relevance_of_the_library(shards, run, tmp_path):
    """KEY.npz is what `attribute` gives, relevance.csv its ledger, and each map has its picture."""
    explain(ExplainConfig(run, shards, limit=4, classes="d,a", cache=tmp_path / "cache"))
    index = read_index(shards)
    by_key = {sample.key: i for i, sample in enumerate(index.samples)}
    with open(run / "test" / "relevance.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["d", "a"] * 4
    assert len({index.samples[by_key[row["key"]]].label for row in rows}) == 3
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
    [({"classes": "a,x"}, "no class 'x'"), ({"limit": 0}, "limit"), ({"batch_size": 0}, "batch")],
)
def test_bad_options_are_refused(shards, run, options, message):
    """An unknown class or a number that cannot be meant is refused before anything is written."""
    with pytest.raises(CxrdistError, match=message):
        explain(ExplainConfig(run, shards, cache=run / "cache", **options))
    assert not (run / "test").exists()


def test_class_names_make_safe_file_names():
    """A slash in a class name leads to no other folder."""
    assert picture_name("key", "Viral Pneumonia") == "key.Viral Pneumonia.png"
    assert picture_name("key", "../a/b") == "key...-a-b.png"
