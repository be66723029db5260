import csv

import numpy as np
import pytest
import torch
from PIL import Image
from support import make_images

from cxrdist.config import Network, PredictConfig
from cxrdist.data.images import read_square
from cxrdist.errors import CxrdistError
from cxrdist.model.densenet import Classifier, load_model, save_model
from cxrdist.predict import predict


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    network = Network(growth_rate=4, block_config=(2, 2, 2, 2))
    save_model(Classifier(network, ["a", "b c"], 32, fit="pad"), tmp_path / "run" / "model")
    return tmp_path / "run"


def test_probabilities_are_those_of_the_loaded_model(run, tmp_path):
    """Files and folders, prepared as the training images were, one row each in order."""
    folder = make_images(tmp_path / "in", {"x": 3, "y": 2})
    files = sorted(folder.rglob("*.png"))
    out = tmp_path / "out.csv"
    predict(PredictConfig(run, [folder / "x", *files[3:]], out, batch_size=2))
    with open(out) as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(file) for file in files]
    model = load_model(run)
    for row, file in zip(rows, files, strict=True):
        image = torch.from_numpy(read_square(file, 32, "pad").copy())[None, None]
        expected = torch.sigmoid(model(image))[0]
        found = [float(row["prob_a"]), float(row["prob_b c"])]
        assert np.allclose(found, expected.detach(), atol=1e-6)
        assert row["predicted"] == ["a", "b c"][int(expected.argmax())]


def test_the_class_is_that_of_the_larger_logit(run, tmp_path):
    """Logits 18 and 25: the second class, although float32 gives both the probability 1."""
    model = load_model(run)
    torch.nn.init.zeros_(model.network.classifier.weight)
    model.network.classifier.bias.data = torch.tensor([18.0, 25.0])
    save_model(model, run / "model")
    folder = make_images(tmp_path / "in", {"x": 2})
    predict(PredictConfig(run, [folder], tmp_path / "out.csv"))
    with open(tmp_path / "out.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["predicted"] for row in rows] == ["b c"] * 2
    assert list(rows[0]) == ["path", "prob_a", "prob_b c", "predicted"]


def test_explain_writes_heat_maps_beside_the_table(run, tmp_path):
    """--explain gives the X-ray and a map for each class."""
    folder = make_images(tmp_path / "in", {"x": 2})
    predict(PredictConfig(run, [folder], tmp_path / "out.csv", explain=True))
    pictures = sorted((tmp_path / "out-heatmaps").iterdir())
    assert len(pictures) == 2 * 3
    assert all(Image.open(picture).size == (32, 32) for picture in pictures)


@pytest.mark.parametrize("name", ["lost.png", "bad.png", "empty"])
def test_bad_input_leaves_no_table(run, tmp_path, name):
    """A missing file, an unreadable one, and an empty folder are named, and nothing is written."""
    (tmp_path / "bad.png").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CxrdistError, match=name):
        predict(PredictConfig(run, [tmp_path / name], tmp_path / "out.csv"))
    assert not (tmp_path / "out.csv").exists()
