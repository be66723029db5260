import json
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from support import run_measured

from cxrdist.config import Network
from cxrdist.errors import CxrdistError
from cxrdist.model.densenet import (
    Classifier,
    Cover,
    load_model,
    save_calibration,
    save_model,
)
from cxrdist.model.description import Calibration
from cxrdist.model.networks import block_names, block_of
from cxrdist.model.weights import read_weights

LOAD_LARGE = """
import json, sys
from pathlib import Path
from cxrdist.errors import CxrdistError
from cxrdist.model.densenet import load_model
file = Path(sys.argv[1], "model", "model.json")
whole = json.loads(file.read_text())
large = {"growth_rate": 128, "block_config": [128] * 4, "dropout": 0.5}
file.write_text(json.dumps({**whole, "architecture": large}))
try:
    load_model(sys.argv[1])
except CxrdistError as error:
    print(error)
file.write_text(json.dumps(whole))
"""
SMALL = Network(growth_rate=4, block_config=(2, 2, 2, 2))


def test_it_is_torchvisions_densenet121_with_a_head_of_its_own():
    """With torchvision's weights the logits are torchvision's, and grey values are normalised."""
    reference = torchvision.models.densenet121(num_classes=3).eval()
    model = Classifier(Network(), ["a", "b", "c"], 64).eval()
    model.network.load_state_dict(reference.state_dict())
    images = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = (images / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    assert torch.allclose(model(images), reference(inputs), atol=1e-5)


def test_every_parameter_has_its_block():
    """A transition belongs to the block before it, norm5 to the last dense block."""
    model = Classifier(Network(), ["a", "b"], 64)
    blocks = {name: block_of(name, model.shape) for name, _ in model.network.named_parameters()}
    assert set(blocks.values()) == set(block_names(model.shape))
    assert blocks["features.conv0.weight"] == "stem"
    assert blocks["features.norm0.bias"] == "stem"
    assert blocks["features.transition2.conv.weight"] == "denseblock2"
    assert blocks["features.norm5.weight"] == "denseblock4"
    assert blocks["classifier.bias"] == "head"


def test_a_saved_model_is_loaded_without_the_recipe(tmp_path):
    """model.json and model.safetensors are enough for the same logits."""
    model = Classifier(SMALL, ["a", "b c"], 32, fit="pad").eval()
    for module in model.network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    (tmp_path / "model").mkdir()
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 1, 32, 32), np.uint8))
    assert torch.equal(model(images), loaded(images))
    assert (loaded.classes, loaded.image_size_px, loaded.fit) == (["a", "b c"], 32, "pad")
    assert not loaded.training


def test_a_model_keeps_what_its_images_were(tmp_path):
    """Depth and cover of the training images are saved; a model.json from before has neither."""
    model = Classifier(SMALL, ["a", "b"], 32)
    model.depth, model.cover = 12, Cover("fill", "test")
    (tmp_path / "model").mkdir()
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path)
    assert (loaded.depth, loaded.cover) == (12, Cover("fill", "test"))
    assert [Cover("black", split).is_of_training for split in ("train", "val", "test", "all")] == [
        1,
        0,
        0,
        1,
    ]
    about = tmp_path / "model" / "model.json"
    description = json.loads(about.read_text())
    for name in ("depth", "cover"):
        del description[name]
    about.write_text(json.dumps(description))
    loaded = load_model(tmp_path)
    assert (loaded.depth, loaded.cover) == (None, None)


@pytest.mark.parametrize(
    "field", [{"depth": 17}, {"depth": 12.0}, {"depth": "12"}, {"cover": "black"}, {"cover": {}}]
)
def test_a_depth_or_cover_that_no_pack_makes_is_refused(tmp_path, field):
    """A number or word out of range is an error of the model's files, not of predict's images."""
    (tmp_path / "model").mkdir()
    save_model(Classifier(SMALL, ["a", "b"], 32), tmp_path / "model")
    about = tmp_path / "model" / "model.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | field))
    with pytest.raises(CxrdistError, match=r"model.json: (depth|cover)"):
        load_model(tmp_path)


def test_a_calibration_is_put_beside_the_weights(tmp_path):
    """It is read with the model; all else of model.json, also of newer versions, stays."""
    (tmp_path / "model").mkdir()
    save_model(Classifier(SMALL, ["a", "b"], 32), tmp_path / "model")
    file = tmp_path / "model" / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "newer": [1]}))
    before, weights = json.loads(file.read_text()), (file.parent / "model.safetensors").read_bytes()
    assert load_model(tmp_path).calibration is None
    of_b = "val has 3 images with it"
    found = Calibration({"a": 1.7}, "youden", {"a": -0.3}, {"b": of_b}, 10, "0" * 64, 90, 70)
    save_calibration(found, file.parent)
    assert load_model(tmp_path).calibration == found
    after = json.loads(file.read_text())
    assert after.pop("calibration")["thresholds"] == {"a": -0.3}
    before.pop("calibration")
    assert after == before
    assert (file.parent / "model.safetensors").read_bytes() == weights
    file.write_text(file.read_text().replace("1.7", "0"))
    with pytest.raises(CxrdistError, match=r"calibration\.temperatures\.a: is 0"):
        load_model(tmp_path)


@pytest.mark.parametrize("damage", ["no run", "cut weights", "other format", "other shape"])
def test_a_damaged_model_is_refused(tmp_path, damage):
    """A run without a model, or with half of one, is one clear error."""
    if damage != "no run":
        (tmp_path / "model").mkdir()
        save_model(Classifier(SMALL, ["a", "b"], 32), tmp_path / "model")
    about = tmp_path / "model" / "model.json"
    weights = tmp_path / "model" / "model.safetensors"
    if damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "other format":
        about.write_text(about.read_text().replace("cxrdist-model-1", "cxrdist-model-9"))
    elif damage == "other shape":
        about.write_text(about.read_text().replace('"growth_rate": 4', '"growth_rate": 5'))
    with pytest.raises(CxrdistError, match=r"finished `cxrdist train`|model\.json: |do not make"):
        load_model(tmp_path)


FIELDS = [
    *(("architecture.growth_rate", value) for value in (3000, 10**9, 0, -1, 4.0, "4", True, None)),
    *(("architecture.block_config", v) for v in ([10**6] * 4, [2] * 3, [2] * 5, 2, "2222", [[2]])),
    *(("architecture.dropout", value) for value in (1, -0.1, "0", float("nan"), None)),
    *(("architecture", value) for value in ([], "x", None, {})),
    *(
        ("classes", value)
        for value in ("ab", ["a", "a"], ["a", 1], {"a": 1, "b": 2}, [["a"]], ["a"])
    ),
    *(("classes", value) for value in ([], ["a", "b|c"], ["a", ""], ["a", "b", "c"])),
    *(("image_size_px", value) for value in (20_000, 0, -1, 32.0, "32", True, None)),
    *(("fit", value) for value in ("evil", None, 1, ["crop"])),
    *(("task", value) for value in ("evil", None, 1)),
    *(("normalisation.mean", v) for v in ([float("nan")] * 3, [0.5], [0.5] * 2, "abc", [True] * 3)),
    *(
        ("normalisation.std", v)
        for v in ([0, 1, 1], [-1] * 3, [float("inf")] * 3, [1e-300] * 3, [])
    ),
    *(("normalisation", value) for value in (None, [], {})),
    *(("weights", value) for value in ("x", [], {"source": 1}, {"source": "a", "started_from": 1})),
    *(("format", value) for value in ("cxrdist-model-9", None)),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with a small model of two classes."""
    run = tmp_path_factory.mktemp("saved")
    (run / "model").mkdir()
    save_model(Classifier(SMALL, ["a", "b"], 32), run / "model")
    return run


@pytest.mark.parametrize(("path", "value"), FIELDS)
def test_what_describes_a_model_has_types_and_bounds(saved, tmp_path, path, value):
    """model.json may come from anybody: one line that names the file, before anything is built."""
    description = json.loads((saved / "model" / "model.json").read_text())
    *outer, last = path.split(".")
    holder = description
    for part in outer:
        holder = holder[part]
    holder[last] = value
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text(json.dumps(description))
    (tmp_path / "model" / "model.safetensors").hardlink_to(saved / "model" / "model.safetensors")
    with pytest.raises(CxrdistError, match=r"model\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[" * 10**5, '{"format":' * 10**5, "[]", "\x00"])
def test_a_description_that_is_no_object_is_refused(saved, tmp_path, text):
    """Cut, nested too deep, something else."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text(text)
    with pytest.raises(CxrdistError, match=r"model\.json: "):
        load_model(tmp_path)


def test_a_large_network_without_its_weights_costs_nothing(saved, tmp_path):
    """The largest one that passes the bounds has 4 GB; shapes are compared before that."""
    done = run_measured(LOAD_LARGE, saved)
    assert done.code == 0, done.stderr
    assert "do not make a model" in done.stdout
    assert done.mib < 1024


def boolean(weights):
    weights["features.norm0.weight"] = weights["features.norm0.weight"] > 0


def integer(weights):
    weights["features.conv0.weight"] = weights["features.conv0.weight"].to(torch.int8)


def not_finite(weights):
    weights["features.conv0.weight"][0, 0, 0, 0] = float("inf")


def other_counter(weights):
    weights["features.norm0.num_batches_tracked"] = torch.tensor(True)


def half(weights):
    for name, tensor in weights.items():
        weights[name] = tensor.half() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (boolean, r"features\.norm0\.weight contains bool numbers, expected floating point"),
        (integer, r"features\.conv0\.weight contains int8 numbers, expected floating point"),
        (not_finite, r"features\.conv0\.weight contains numbers that are not finite"),
        (other_counter, r"features\.norm0\.num_batches_tracked contains bool numbers"),
        (half, None),
    ],
)
def test_weights_are_floating_point(saved, tmp_path, change, message):
    """Whole numbers and truth values are refused by name; less precise weights are converted."""
    weights = load_file(saved / "model" / "model.safetensors")
    change(weights)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").hardlink_to(saved / "model" / "model.json")
    save_file(weights, tmp_path / "model" / "model.safetensors")
    if message:
        for read in (partial(load_model, tmp_path), partial(read_weights, str(tmp_path))):
            with pytest.raises(CxrdistError, match=message):
                read()
    else:
        dtypes = {tensor.dtype for tensor in load_model(tmp_path).parameters()}
        assert dtypes == {torch.float32}
