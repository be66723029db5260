import csv
import json

import numpy as np
import pytest
import torch
from support import claim_shards, make_shards, run_ranks

from cxrdist.config import EvaluateConfig, ExplainConfig, Network
from cxrdist.data.cache import open_cache
from cxrdist.data.index import read_index
from cxrdist.distributed import start
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.predictions import evaluate
from cxrdist.explain.export import explain
from cxrdist.files import locked
from cxrdist.model.densenet import Classifier, load_model, save_model

CLASSES = ["a", "b c", "d"]
ALONE = {"split": "0.6/0.2/0.2", "patient_pattern": None}
SMALL = Network(growth_rate=4, block_config=(2, 2, 2, 2))


def make_run(path, classes=CLASSES, size=32, logits=None):
    """A run directory with a random model, enough to evaluate; or one that always gives logits."""
    (path / "model").mkdir(parents=True)
    model = Classifier(SMALL, list(classes), size)
    if logits is not None:
        torch.nn.init.zeros_(model.network.classifier.weight)
        model.network.classifier.bias.data = torch.tensor(logits)
    save_model(model, path / "model")
    return path


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("world", [3])
def test_seven_images_over_three_ranks_are_predicted_once_and_alike(tmp_path, world):
    """One rank with fewer images and one with none: the same files, byte for byte, as one rank.

    So is what is chosen on val, in model.json.
    """
    shards = make_shards(tmp_path, {"a": 10, "b c": 10, "d": 15}, **ALONE)
    run = claim_shards(make_run(tmp_path / "run"), shards)
    command = ("-m", "cxrdist", "evaluate", "--run", run, "--shards", shards)
    options = ("--cache", tmp_path / "cache", "--batch-size", 4, "--fewest", 2)
    files = ("test/predictions.csv", "test/metrics.json", "model/model.json")
    found, model = {}, (run / files[2]).read_bytes()
    for ranks in (1, world):
        (run / files[2]).write_bytes(model)
        done = run_ranks(ranks, *command, *options)
        assert done.returncode == 0, done.stderr
        found[ranks] = [(run / name).read_bytes() for name in files]
    assert found[1] == found[world]
    assert b"temperatures" in found[world][2]
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
        predicted = max(CLASSES, key=lambda name: float(row[f"logit_{name}"]))
        matrix[CLASSES.index(row["label"])][CLASSES.index(predicted)] += 1
    assert metrics["confusion_matrix"] == matrix
    correct = sum(matrix[i][i] for i in range(3))
    assert metrics["accuracy"] == pytest.approx(correct / len(rows), abs=1e-6)
    assert f"({correct} of {len(rows)};" in capsys.readouterr().out


def test_a_run_without_run_json_says_whose_images_it_takes_them_for(shards, tmp_path, capsys):
    """It may be of other shards; a run that names its shards says nothing."""
    run = make_run(tmp_path / "run")
    for is_unknown in (True, False):
        evaluate(EvaluateConfig(run, shards, cache=tmp_path / "cache"))
        assert ("so it is unknown whether" in capsys.readouterr().out) is is_unknown
        claim_shards(run, shards)


def test_two_at_once_do_not_mix_their_files(shards, tmp_path):
    """The second one is refused before it decodes an image, on that split alone."""
    run, cache = make_run(tmp_path / "run"), tmp_path / "cache"
    with locked(run / "test" / "mistakes"):
        with pytest.raises(CxrdistError, match="another cxrdist process is writing here"):
            evaluate(EvaluateConfig(run, shards, cache=cache))
        assert not cache.exists()
        evaluate(EvaluateConfig(run, shards, split="val", cache=cache))
    assert not (run / "test").exists()
    assert (run / "val" / "metrics.json").is_file()


def test_sure_predictions_are_told_apart(shards, tmp_path):
    """Of the logits 18, 25 and -40 the second is the class, of every image, and all are written."""
    run = make_run(tmp_path / "run", logits=[18.0, 25.0, -40.0])
    evaluate(EvaluateConfig(run, shards, cache=tmp_path / "cache"))
    metrics = json.loads((run / "test" / "metrics.json").read_text())
    assert [row[1] for row in metrics["confusion_matrix"]] == [6, 6, 6]
    for row in read_rows(run / "test" / "predictions.csv"):
        names = [f"{what}_{name}" for what in ("prob", "logit") for name in CLASSES]
        assert list(row) == ["key", "patient", "label", "source", *names]
        assert [row[f"logit_{name}"] for name in CLASSES] == ["18", "25", "-40"]
        # 1 / (1 + exp(-18)), ... to nine significant digits
        assert [row[f"prob_{n}"] for n in CLASSES] == ["0.999999985", "1", "4.24835426e-18"]


def test_logits_are_read_back_exactly(shards, tmp_path):
    """Nine significant digits hold a float32: predictions.csv gives the network's very numbers."""
    run = make_run(tmp_path / "run")
    evaluate(EvaluateConfig(run, shards, cache=tmp_path / "cache"))
    index, model = read_index(shards), load_model(run)
    numbers = np.array(index.numbers("test"))
    images = torch.from_numpy(open_cache(index, tmp_path / "cache", start())[numbers].copy())
    with torch.inference_mode():
        expected = model(images[:, None]).numpy()
    rows = read_rows(run / "test" / "predictions.csv")
    found = np.array([[row[f"logit_{name}"] for name in CLASSES] for row in rows], np.float32)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("classes", "size", "message"),
    [(["a", "b", "d"], 32, "have the classes"), (CLASSES, 64, "pack with --size 64")],
)
def test_shards_that_are_not_the_models_are_refused(shards, tmp_path, classes, size, message):
    """Other classes or another image size would give numbers without a meaning."""
    run = make_run(tmp_path / "run", classes, size)
    with pytest.raises(CxrdistError, match=message):
        evaluate(EvaluateConfig(run, shards, cache=tmp_path / "cache"))


def test_shards_for_evaluation_only_are_evaluated_and_have_no_other_split(tmp_path):
    """Of --split 0/0/1 all images are test; another split is refused in one line."""
    shards = make_shards(tmp_path, dict.fromkeys(CLASSES, 4), split="0/0/1")
    run = make_run(tmp_path / "run")
    evaluate(EvaluateConfig(run, shards, cache=tmp_path / "cache"))
    assert len(read_rows(run / "test" / "predictions.csv")) == 12
    message = r"--split val: --shards .* have no images in it, only in test; choose"
    with pytest.raises(CxrdistError, match=message):
        evaluate(EvaluateConfig(run, shards, split="val", cache=tmp_path / "cache"))
    with pytest.raises(CxrdistError, match=message):
        explain(ExplainConfig(run, shards, split="val", cache=tmp_path / "cache"))
    assert not (run / "val").exists()
