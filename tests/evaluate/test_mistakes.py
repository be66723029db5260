"""What is a mistake, in which order they come, and that each of them gets its picture."""

import numpy as np
import pytest
from PIL import Image
from support import make_shards

from cxrdist.config import EvaluateConfig, Network
from cxrdist.data.cache import open_cache
from cxrdist.data.index import read_index
from cxrdist.distributed import start
from cxrdist.evaluate import predictions
from cxrdist.evaluate.mistakes import find_mistakes
from cxrdist.evaluate.predictions import evaluate
from cxrdist.evaluate.scored import Scored, read_scored
from cxrdist.model.densenet import Classifier, save_model


def scored(task: str, targets: list[list[int]], logits: list[list[float]]) -> Scored:
    """Scored images of classes a, b and so on."""
    classes = list("abcdefgh"[: len(logits[0])])
    keys = [f"k{i}" for i in range(len(logits))]
    return Scored(task, classes, keys, keys, np.array(targets, np.int8), np.array(logits), {})


def test_of_classes_the_surest_mistakes_come_first():
    """Only images whose likeliest class is another, by their largest logit, ties by place."""
    targets = [[1, 0], [1, 0], [0, 1], [1, 0], [0, 1]]
    logits = [[-9, 18], [-9, 25], [-9, 50], [1, 25], [30, 2]]
    found = find_mistakes(scored("multiclass", targets, logits))
    assert [mistake.position for mistake in found] == [4, 1, 3, 0]
    assert found[0][1:] == (["b"], ["a"])
    assert found[1][1:] == (["a"], ["b"])


def test_labels_take_turns_with_their_surest_mistakes():
    """False positive and false negative of each label in turn; an unknown cell is no mistake."""
    targets = [[0, 0], [0, 0], [1, 0], [0, 1], [-1, -2], [1, 1]]
    logits = [[3, -1], [5, -1], [-4, 2], [-1, -7], [9, 9], [1, 1]]
    found = find_mistakes(scored("multilabel", targets, logits))
    assert [mistake.position for mistake in found] == [1, 2, 3, 0]
    assert found[1][1:] == (["a"], ["b"])  # image 2 has a, which was missed, and no b
    at_six = find_mistakes(scored("multilabel", targets, logits), {"a": 6.0})
    assert [mistake.position for mistake in at_six] == [2, 3, 5]
    assert {label for mistake in at_six for label in mistake.missed} == {"a", "b"}


def test_a_logit_read_from_nine_digits_is_called_as_the_networks_own():
    """The image whose logit became the threshold is no mistake after its row was read back."""
    exact = float(np.float32(0.1))
    logit = float(f"{exact:.9g}")
    assert logit < exact
    assert find_mistakes(scored("multilabel", [[1]], [[logit]]), {"a": exact}) == []


def test_every_mistake_of_labels_is_listed_once():
    """As a loop over all cells finds them, with thresholds of each label."""
    random = np.random.default_rng(0)
    targets, logits = random.integers(-2, 2, (300, 5)), random.normal(0, 2, (300, 5))
    limits = dict(zip("abcde", random.normal(0, 1, 5), strict=True))
    found = find_mistakes(scored("multilabel", targets.tolist(), logits.tolist()), limits)
    expected = {}
    for i, j in np.ndindex(300, 5):
        called = logits[i, j] >= limits["abcde"[j]]
        if targets[i, j] == (not called):
            expected.setdefault(i, ([], []))[int(called)].append("abcde"[j])
    assert len(found) == len(expected)
    assert {mistake.position: mistake[1:] for mistake in found} == expected


@pytest.fixture
def run(tmp_path):
    """A run whose network always gives the same logits, and its shards."""
    make_shards(tmp_path, {"a": 12, "b": 12})
    model = Classifier(Network(growth_rate=4, block_config=(2, 2, 2, 2)), ["a", "b"], 32)
    model.network.classifier.weight.data.zero_()
    (tmp_path / "run" / "model").mkdir(parents=True)
    save_model(model.eval(), tmp_path / "run" / "model")
    return tmp_path


def test_every_mistake_has_its_picture(run, monkeypatch):
    """After `evaluate`, the square as the network saw it; those of an older model are removed."""
    pictures = run / "run" / "test" / "mistakes"
    pictures.mkdir(parents=True)
    (pictures / "older-0123abcd.png").write_bytes(b"an older one")
    (pictures / "notes.txt").write_text("the user's")
    config = EvaluateConfig(run / "run", run / "shards", cache=run / "cache")
    evaluate(config)
    found = read_scored(run / "run" / "test" / "predictions.csv", "multiclass")
    keys = [found.keys[mistake.position] for mistake in find_mistakes(found)]
    assert len(keys) == len(found) / 2
    names = {file.name for file in pictures.iterdir()}
    assert names == {*(f"{key}.png" for key in keys), "notes.txt", ".lock"}
    index = read_index(run / "shards")
    images = open_cache(index, run / "cache", start())
    for number, sample in enumerate(index.samples):
        if sample.key in keys:
            with Image.open(pictures / f"{sample.key}.png") as picture:
                assert np.array_equal(np.asarray(picture), images[number])
    monkeypatch.setattr(predictions, "MOST_PICTURED", 2)
    evaluate(config)
    assert {f.name for f in pictures.glob("*.png")} == {f"{key}.png" for key in keys[:2]}
