import json

import numpy as np
import pytest
import torch
import torchvision

from cxrdist.config import Network
from cxrdist.errors import CxrdistError
from cxrdist.model.densenet import (
    Classifier,
    Cover,
    block_names,
    block_of,
    load_model,
    save_model,
)

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
    blocks = {name: block_of(name) for name, _ in model.network.named_parameters()}
    assert set(blocks.values()) == set(block_names(model.network))
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
