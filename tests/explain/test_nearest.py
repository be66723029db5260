"""The nearest training image, and that the mistakes are explained first."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import make_run
from support import contents, run_ranks

from cxrdist.config import EvaluateConfig, ExplainConfig
from cxrdist.data.cache import open_cache
from cxrdist.data.index import read_index
from cxrdist.distributed import start
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.loaded_run import load_images, open_run_on
from cxrdist.evaluate.mistakes import find_mistakes
from cxrdist.evaluate.predictions import evaluate
from cxrdist.evaluate.scored import read_scored
from cxrdist.explain.export import explain
from cxrdist.explain.nearest import find_nearest, read_nearest, was_trained_on, write_nearest
from cxrdist.explain.targets import choose_samples
from cxrdist.model.densenet import load_model
from cxrdist.run import RunDirectory


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small run by the real commands, its shards and cache."""
    return make_run(tmp_path_factory.mktemp("small"))


def features(small, numbers):
    """What goes into the last layer, caught on its way, [n, features] of unit length."""
    model, seen = load_model(small / "run"), []
    model.network.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = open_cache(read_index(small / "shards"), small / "cache", start())
    with torch.inference_mode():
        model(torch.from_numpy(images[numbers]).unsqueeze(1))
    found = seen[0].double().numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize("split", ["test", "train"])
def test_the_nearest_training_image_has_the_largest_cosine(small, split):
    """By a loop over all pairs; an image of the train split is not its own neighbour."""
    where = {"cache": small / "cache", "split": split}
    explain(ExplainConfig(small / "run", small / "shards", limit=4, **where))
    index = read_index(small / "shards")
    explained, train = choose_samples(index, split, 4), index.numbers("train")
    if split == "test":
        evaluated = small / "run" / "test" / "relevance.csv"
        keys = {row["key"] for row in csv.DictReader(evaluated.read_text().splitlines())}
        explained = [n for n in index.numbers("test") if index.samples[n].key in keys]
    alike = features(small, explained) @ features(small, train).T
    alike[np.array(explained)[:, None] == np.array(train)] = -2
    found = read_nearest(small / "run" / split / "nearest.csv")
    assert len(found) == len(explained) == 4
    images = open_cache(index, small / "cache", start())
    for number, row in zip(explained, alike, strict=True):
        best = train[int(row.argmax())]
        nearest = found[index.samples[number].key]
        assert nearest.nearest == index.samples[best].key
        assert nearest.similarity == pytest.approx(row.max(), abs=1e-5)
        assert (nearest.label, nearest.patient) == index.samples[best][3:5]
        with Image.open(small / "run" / split / "nearest" / f"{nearest.nearest}.png") as picture:
            assert np.array_equal(np.asarray(picture), images[best])


def test_the_only_training_image_has_no_neighbour(small):
    """Explained itself it has no row; another image still finds it."""
    index = read_index(small / "shards")
    first, *others = index.numbers("train")
    samples = [*index.samples]
    for number in others:
        samples[number] = samples[number]._replace(split="val")
    one = replace(index, samples=samples)
    opened = open_run_on(small / "run", small / "shards", "train")
    loaded = replace(load_images(opened, small / "cache"), index=one)
    assert one.numbers("train") == [first]
    assert find_nearest(loaded, np.array([first])) == []
    (other,) = find_nearest(loaded, np.array([others[0]]))
    assert other.nearest == index.samples[first].key
    write_nearest(loaded, [])
    assert read_nearest(small / "run" / "train" / "nearest.csv") == {}
    (small / "run" / "train" / "nearest.csv").unlink()


def test_ranks_do_not_change_what_is_nearest(small, tmp_path):
    """Two ranks write the bytes of one."""
    where = ("--shards", small / "shards", "--cache", small / "cache", "--limit", 4)
    explain(ExplainConfig(small / "run", small / "shards", cache=small / "cache", limit=4))
    before = contents(small / "run" / "test")
    assert "nearest.csv" in before
    (small / "run" / "test" / "nearest.csv").unlink()
    done = run_ranks(2, "-m", "cxrdist", "explain", "--run", small / "run", *where)
    assert done.returncode == 0, done.stderr
    assert contents(small / "run" / "test") == before


def test_other_shards_have_no_nearest_training_image(small):
    """Their train split is not what the network has seen; nor is that of a run without run.json."""
    run, index = RunDirectory(small / "run"), read_index(small / "shards")
    assert was_trained_on(run, index)
    assert not was_trained_on(run, replace(index, sha256="0" * 64))
    assert not was_trained_on(RunDirectory(small / "shards"), index)


def test_the_mistakes_are_explained_first(small):
    """With a limit the surest mistakes of predictions.csv, but not those on other shards."""
    run, where = small / "run", {"cache": small / "cache"}
    evaluate(EvaluateConfig(run, small / "shards", **where))
    scored = read_scored(run / "test" / "predictions.csv", "multiclass")
    mistakes = [scored.keys[mistake.position] for mistake in find_mistakes(scored)]
    assert len(mistakes) > 1

    def explained(limit: int) -> set[str]:
        explain(ExplainConfig(run, small / "shards", limit=limit, **where))
        rows = csv.DictReader((run / "test" / "relevance.csv").read_text().splitlines())
        return {row["key"] for row in rows}

    assert explained(1) == {mistakes[0]}
    assert explained(len(mistakes) + 1) > {*mistakes}
    path = run / "test" / "metrics.json"  # as if it were of other shards
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps({**metrics, "index_sha256": "0" * 64}))
    index = read_index(small / "shards")
    in_turn = choose_samples(index, "test", len(mistakes))
    assert explained(len(mistakes)) == {index.samples[n].key for n in in_turn}
    path.write_text(json.dumps(metrics))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("k,n,2.5,a,p", "line 2"),
        ("k,n", "line 2"),
        ("k,n,x,a,p", "line 2: could not convert"),
    ],
)
def test_a_broken_table_is_named_in_one_line(tmp_path, row, message):
    """The file, what is wrong with it, and the command that writes it."""
    path = tmp_path / "nearest.csv"
    path.write_text(f"key,nearest,similarity,label,patient\n{row}\n")
    with pytest.raises(CxrdistError, match=rf"nearest\.csv.*{message}.*cxrdist explain"):
        read_nearest(path)
    path.write_text("key,other\n")
    with pytest.raises(CxrdistError, match="expected the columns"):
        read_nearest(path)
