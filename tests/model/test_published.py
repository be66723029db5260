"""Models by their names: a run, an exported folder, published weights, the Hub."""

import shutil

import huggingface_hub
import pytest
import torch
from test_weights import as_arnoweng, torchvision_network, xray_network

import cxrdist
from cxrdist.config import Network, WeightsConvertConfig
from cxrdist.data.chestxray14 import LABELS
from cxrdist.errors import CxrdistError
from cxrdist.files import write_json
from cxrdist.model.densenet import Classifier, save_model
from cxrdist.model.inventory import convert_weights
from cxrdist.model.published import load_model, model_folder

SMALL = Network(growth_rate=4, block_config=(1, 1, 1, 1))
IMAGES = torch.arange(2 * 224**2).remainder(251).to(torch.uint8).reshape(2, 1, 224, 224)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    save_model(Classifier(SMALL, ["a", "b"], 32), tmp_path / "run" / "model")
    return tmp_path / "run"


def same(first: Classifier, second: Classifier) -> bool:
    state, other = first.state_dict(), second.state_dict()
    return state.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in state.items())


def test_a_run_and_an_exported_folder_give_the_same_model(run):
    """By a path or a text, in evaluation mode; the folder is what RUN/model is."""
    expected = load_model(run)
    assert not expected.training
    assert cxrdist.load_model is load_model
    assert same(load_model(str(run)), expected)
    assert same(load_model(run / "model"), expected)


def test_a_published_chexnet_gives_its_own_logits_and_labels(tmp_path):
    """Fourteen labels in the published order, several per image; the head is the published one."""
    network = torchvision_network().eval()
    content = as_arnoweng(network)
    torch.save(content, tmp_path / "chexnet.pth.tar")
    model = load_model(tmp_path / "chexnet.pth.tar")
    assert (model.classes, model.task, model.image_size_px) == ([*LABELS], "multilabel", 224)
    with torch.no_grad():
        head = network.classifier[0]  # behind it as_arnoweng has put a sigmoid
        features = torch.relu(network.features(model.normalise(IMAGES))).mean((2, 3))
        assert torch.allclose(model(IMAGES), head(features), atol=1e-5)


def test_outputs_without_a_name_are_left_out(tmp_path):
    """Torchxrayvision names outputs that were not trained with an empty text."""
    network = xray_network().eval()
    names = [*map(str, range(18))]
    network.pathologies = ["", *names[1:17], ""]
    torch.save(network, tmp_path / "xray.pt")
    model = load_model(tmp_path / "xray.pt")
    assert model.classes == names[1:17]
    head = network.state_dict()["classifier.weight"]
    assert torch.equal(model.network.classifier.weight, head[1:17])


def test_what_is_not_a_model_is_refused_in_one_line(tmp_path, run):
    """The line says what a model may be; weights without names of classes are none."""
    torch.save(torchvision_network().state_dict(), tmp_path / "nameless.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "ensemble" / "model").mkdir(parents=True)
    members = {"format": "cxrdist-ensemble-1", "members": ["member-0", "member-1"]}
    write_json(tmp_path / "ensemble" / "model" / "model.json", members)
    cases = [
        ("chexnett", r"chexnett: is not a model; expected the run directory.*chexnet, or hf:"),
        (tmp_path / "empty", r"empty: is not a model.*`cxrdist export --to huggingface`"),
        (tmp_path / "ensemble", r"^/.*ensemble: is an ensemble.*such as .*member-0"),
        ("none", r"none: is not a model"),
        (tmp_path / "nameless.pt", r"nameless\.pt: has no output layer with class names"),
        ("hf:", r"hf:: expected hf:OWNER/NAME"),
        ("hf:a/b/c", r"expected hf:OWNER/NAME"),
    ]
    for source, line in cases:
        with pytest.raises(CxrdistError, match=line) as raised:
            load_model(source)
        assert "\n" not in str(raised.value)


def test_a_run_that_was_converted_is_refused(tmp_path, run):
    """The file lacks the task, size and fit of its images, so its predictions could be wrong."""
    convert_weights(WeightsConvertConfig(str(run), tmp_path / "run.safetensors"))
    with pytest.raises(CxrdistError, match=r"run\.safetensors: was converted from a run, .* give"):
        load_model(tmp_path / "run.safetensors")


def test_a_model_of_the_hub_comes_out_of_its_cache(tmp_path, run, monkeypatch):
    """A folder that was fetched before is loaded offline; another one is refused by its name."""
    revision = "0" * 40
    stored = tmp_path / "hub" / "models--ward--xray"
    shutil.copytree(run / "model", stored / "snapshots" / revision)
    weights = stored / "snapshots" / revision / "model.safetensors"
    (stored / "blobs").mkdir()
    weights.rename(stored / "blobs" / "weights")
    weights.symlink_to(stored / "blobs" / "weights")  # as the Hub's cache has it
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert same(load_model("hf:ward/xray"), load_model(run))
    assert same(load_model(f"hf:ward/xray@{revision}"), load_model(run))
    with pytest.raises(
        CxrdistError, match=r"hf:ward/none: model\.json cannot be fetched"
    ) as raised:
        load_model("hf:ward/none")
    assert "\n" not in str(raised.value)
    weights.unlink()
    weights.write_bytes(b"nothing")
    with pytest.raises(CxrdistError, match=r"^hf:ward/xray: .*do not make a model"):
        load_model("hf:ward/xray")


def test_the_model_of_a_run_comes_before_a_file_beside_it(tmp_path):
    """For predict and load_model alike."""
    (tmp_path / "model.json").touch()
    assert model_folder(tmp_path) == tmp_path
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").touch()
    assert model_folder(tmp_path) == tmp_path / "model"
