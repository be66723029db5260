import csv
import json

import pytest
from support import make_shards, run_ranks

from cxrdist.config import EvaluateConfig, Network
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.predictions import evaluate
from cxrdist.model.densenet import Classifier, save_model

CLASSES = ["a", "b c", "d"]
ALONE = {"split": "0.6/0.2/0.2", "patient_pattern": None}
SMALL = Network(growth_rate=4, block_config=(2, 2, 2, 2))


def make_run(path, classes=CLASSES, size=32):
    """A run directory with a random model, enough to evaluate."""
    (path / "model").mkdir(parents=True)
    save_model(Classifier(SMALL, list(classes), size), path / "model")
    return path


@pytest.mark.parametrize("world", [3])
def test_seven_images_over_three_ranks_are_predicted_once_and_alike(tmp_path, world):
    """One rank with fewer images and one with none: the same files, byte for byte, as one rank."""
    shards = make_shards(tmp_path, {"a": 10, "b c": 10, "d": 15}, **ALONE)
    run = make_run(tmp_path / "run")
    command = ("-m", "cxrdist", "evaluate", "--run", run, "--shards", shards)
    options = ("--cache", tmp_path / "cache", "--batch-size", 4)
    found = {}
    for ranks in (1, world):
        done = run_ranks(ranks, *command, *options)
        assert done.returncode == 0, done.stderr
        found[ranks] = [
            (run / "test" / name).read_bytes() for name in ("predictions.csv", "metrics.json")
        ]
    assert found[1] == found[world]
    rows = list(csv.DictReader(found[1][0].decode().splitlines()))
    with open(shards / "samples.csv") as file:
        expected = [row["key"] for row in csv.DictReader(file) if row["split"] == "test"]
    assert len(expected) == 7
    assert [row["key"] for row in rows] == expected
    assert json.loads(found[1][1])["samples"] == 7


def test_predictions_and_metrics_agree(shards, tmp_path, capsys):
    """metrics.json is what anyone computes from predictions.csv, and so is the printed line."""
    run = make_run(tmp_path / "run")
    evaluate(EvaluateConfig(run, shards, cache=tmp_path / "cache", batch_size=5))
    with open(run / "test" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    metrics = json.loads((run / "test" / "metrics.json").read_text())
    matrix = [[0] * 3 for _ in CLASSES]
    for row in rows:
        predicted = max(CLASSES, key=lambda name: float(row[f"prob_{name}"]))
        matrix[CLASSES.index(row["label"])][CLASSES.index(predicted)] += 1
    assert metrics["confusion_matrix"] == matrix
    correct = sum(matrix[i][i] for i in range(3))
    assert metrics["accuracy"] == pytest.approx(correct / len(rows), abs=1e-6)
    assert f"({correct} of {len(rows)})" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("classes", "size", "message"),
    [(["a", "b", "d"], 32, "have the classes"), (CLASSES, 64, "pack with --size 64")],
)
def test_shards_that_are_not_the_models_are_refused(shards, tmp_path, classes, size, message):
    """Other classes or another image size would give numbers without a meaning."""
    run = make_run(tmp_path / "run", classes, size)
    with pytest.raises(CxrdistError, match=message):
        evaluate(EvaluateConfig(run, shards, cache=tmp_path / "cache"))
