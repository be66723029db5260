"""The networks beside their libraries' own: logits, parts, published weights."""

import hashlib
import json
from dataclasses import asdict
from typing import get_args

import pytest
import timm
import torch
import torchvision
from model_run import make_model, make_model_run
from safetensors.torch import save_file
from torch import nn

from cxrdist.cli import main
from cxrdist.config import TITLES, Architecture, Network
from cxrdist.errors import CxrdistError
from cxrdist.model import published
from cxrdist.model.densenet import Classifier, load_model, save_model
from cxrdist.model.description import Normalisation
from cxrdist.model.download import place_of
from cxrdist.model.layout import recognise
from cxrdist.model.networks import (
    IMAGENET_URLS,
    block_names,
    block_of,
    build_network,
    output_layer,
    refuse_small_squares,
    smallest_size_px,
)
from cxrdist.model.tensorfile import METADATA, TensorFile
from cxrdist.model.weights import apply_weights, read_weights
from cxrdist.train.stages import freeze, set_modes

ARCHITECTURES = get_args(Architecture)
BLOCKS = {
    "resnet18": "stem layer1 layer2 layer3 layer4 head",
    "alexnet": "stem conv2 conv3 conv4 conv5 fc6 fc7 head",
    "squeezenet1_1": "stem fire2 fire3 fire4 fire5 fire6 fire7 fire8 fire9 head",
    "convnext_atto": "stem stages0 stages1 stages2 stages3 head",
}
DENSE_BLOCKS = "stem denseblock1 denseblock2 denseblock3 denseblock4 head"
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def library_network(architecture: str, num_classes: int) -> nn.Module:
    """The library's own network; statistics, scales and biases are not those of a new one."""
    torch.manual_seed(0)
    if architecture == "convnext_atto":
        network = timm.create_model(architecture, num_classes=num_classes)
    else:
        network = getattr(torchvision.models, architecture)(num_classes=num_classes)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith("gamma"):  # ConvNeXt begins with 1e-6, where a block has no part
            tensor.uniform_(0.5, 1)
        elif name.endswith(("running_mean", ".bias")):
            tensor.normal_(0, 0.1)
    return network.eval()


@every_architecture
def test_the_logits_are_those_of_the_librarys_own_network(architecture):
    """The state dict of either loads strictly into the other; the logits are equal to 1e-5.

    SqueezeNet's own ends in a ReLU, which changes nothing where its map is above 0 everywhere.
    """
    expected = library_network(architecture, 3)
    if architecture == "squeezenet1_1":
        expected.classifier[1].bias.data.fill_(9.0)
    model = Classifier(Network(architecture=architecture), ["a", "b", "c"], 65).eval()
    model.network.load_state_dict(expected.state_dict())
    expected.load_state_dict(model.network.state_dict())
    images = torch.randint(0, 256, (2, 1, 65, 65), dtype=torch.uint8)
    with torch.no_grad():
        logits = expected(model.normalise(images))
        found = model(images)
    assert logits.std() > 1e-3
    assert (found - logits).abs().max() <= 1e-5 * max(1, float(logits.abs().max()))


def test_a_logit_of_squeezenet_may_be_below_0():
    """With the published last ReLU no probability could be below one half."""
    model = Classifier(Network(architecture="squeezenet1_1"), ["a", "b"], 32).eval()
    model.network.classifier[1].bias.data.fill_(-3.0)
    assert (model(torch.zeros(1, 1, 32, 32, dtype=torch.uint8)) < -1).all()


@every_architecture
def test_every_parameter_is_in_a_block(architecture):
    """The blocks are those of the table; the head has the output layer's weight and bias only.

    As many parameters as torchvision tells of its own network with 1000 classes.
    """
    shape = Network(architecture=architecture)
    with torch.device("meta"):
        network = build_network(shape, 1000)
    names = BLOCKS.get(architecture, DENSE_BLOCKS).split()
    assert block_names(shape) == names
    of = {name: block_of(name, shape) for name in network.state_dict()}
    assert list(dict.fromkeys(of.values())) == names
    layer = output_layer(shape)
    assert [n for n, b in of.items() if b == "head"] == [f"{layer}.weight", f"{layer}.bias"]
    if architecture != "convnext_atto":
        meta = torchvision.models.get_model_weights(architecture).IMAGENET1K_V1.meta
        assert sum(p.numel() for p in network.parameters()) == meta["num_params"]
    with pytest.raises(ValueError, match="is in no block"):
        block_of("other.weight", shape)


@every_architecture
def test_the_smallest_square_is_what_the_network_can_take(architecture):
    """One pixel less leaves a layer without one, and is refused in one line before that."""
    shape = Network(architecture=architecture)
    smallest = smallest_size_px(shape)
    with torch.device("meta"), torch.no_grad():
        network = build_network(shape, 2).eval()
        assert network(torch.empty(1, 3, smallest, smallest)).shape == (1, 2)
        if smallest > 1:
            with pytest.raises(RuntimeError):
                network(torch.empty(1, 3, smallest - 1, smallest - 1))
    refuse_small_squares(shape, smallest, "--shards S")
    with pytest.raises(CxrdistError, match=f"--shards S: .* needs at least {smallest} px"):
        refuse_small_squares(shape, smallest - 1, "--shards S")


@every_architecture
def test_a_frozen_block_has_no_dropout_and_no_moving_statistics(architecture):
    """Only the head: nothing but its own dropout draws; AlexNet's is in fc6 and fc7."""
    with torch.device("meta"):
        model = Classifier(Network(architecture=architecture, dropout=0.3), ["a", "b"], 64)

    def drawing(trained: set[str]) -> int:
        freeze(model, trained)
        set_modes(model, trained)
        drops = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.training and m.p]
        assert {drop.p for drop in drops} <= {0.3}
        return len(drops)

    in_head = 0 if architecture == "alexnet" else 1
    assert drawing({"head"}) == in_head
    assert not any(norm.training for norm in model.norms)
    trained = [name for name, p in model.network.named_parameters() if p.requires_grad]
    layer = output_layer(model.shape)
    assert trained == [f"{layer}.weight", f"{layer}.bias"]
    blocks = block_names(model.shape)
    assert drawing(set(blocks)) == (2 if architecture == "alexnet" else 1)
    assert all(norm.training for norm in model.norms)
    assert drawing(set(blocks[:2])) == 0
    moving = {n for n, m in model.network.named_modules() if m in model.norms and m.training}
    assert {block_of(name, model.shape) for name in moving} <= set(blocks[:2])
    assert bool(moving) == model.shape.has_batch_norm


@every_architecture
def test_published_weights_are_taken_but_for_the_head(architecture):
    """A state dict of the library with 1000 classes: recognised by its names, loaded whole."""
    published = library_network(architecture, 1000).state_dict()
    weights = recognise(TensorFile(published), "--init w", {"source": "w", "sha256": None})
    assert "ImageNet" in weights.record["layout"]
    model = Classifier(Network(architecture=architecture), ["a", "b"], 64)
    layer = output_layer(model.shape)
    assert list(weights.head) == [f"{layer}.weight", f"{layer}.bias"]
    before = {name: model.network.state_dict()[name].clone() for name in weights.head}
    assert apply_weights(weights, model) == len(published) - 2
    expected = {**published, **before}
    found = model.network.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_resnet_without_counts_of_batches_is_recognised():
    """As torchvision publishes it: its file is older than these counts of BatchNorm."""
    state = library_network("resnet18", 1000).state_dict()
    published = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    weights = recognise(TensorFile(published), "--init w", {"source": "w", "sha256": None})
    assert "ImageNet" in weights.record["layout"]
    model = Classifier(Network(architecture="resnet18"), ["a", "b"], 64)
    assert apply_weights(weights, model) == len(published) - 2 < len(state) - 2


def test_thresholds_that_do_not_fit_the_head_are_refused():
    """Also in the file of another network than a DenseNet, whose head has other names."""
    published = library_network("resnet18", 1000).state_dict()
    file = TensorFile({**published, "op_threshs": torch.zeros(3)})
    with pytest.raises(CxrdistError, match=r"3 thresholds \(op_threshs\) for 1000 outputs"):
        recognise(file, "--init w", {"source": "w", "sha256": None})


def test_a_head_of_other_features_is_refused(tmp_path):
    """One line for any network, also by `load_model`, which uses the head."""
    state = library_network("resnet18", 2).state_dict() | {"fc.weight": torch.zeros(2, 100)}
    note = {"layout": "x", "labels": ["a", "b"], "normalisation": asdict(Normalisation())}
    save_file(state, tmp_path / "w.safetensors", {METADATA: json.dumps(note)})
    with pytest.raises(CxrdistError, match=r"w\.safetensors: the head takes 100 .* has 512; fetch"):
        published.load_model(tmp_path / "w.safetensors")


def test_imagenet_is_the_architectures_own_file(tmp_path, monkeypatch):
    """Found in torch.hub's folder under the name of its URL; another content is refused."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    content = library_network("squeezenet1_1", 1000).state_dict()
    torch.save(content, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    url = f"https://localhost/squeezenet1_1-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    for name in (url, IMAGENET_URLS["squeezenet1_1"]):
        place_of(name).parent.mkdir(parents=True, exist_ok=True)
        place_of(name).write_bytes(data)
    with pytest.raises(CxrdistError, match=r"has the sha256 .*, expected b8a52dc0"):
        read_weights("imagenet", architecture="squeezenet1_1")
    monkeypatch.setitem(IMAGENET_URLS, "squeezenet1_1", url)
    weights = read_weights("imagenet", architecture="squeezenet1_1")
    assert weights.source == url
    assert torch.equal(weights.tensors["features.0.weight"], content["features.0.weight"])


def test_each_published_file_has_its_hash_in_its_name():
    """Without one a file that was exchanged on its way would be taken."""
    assert IMAGENET_URLS.keys() == TITLES.keys() == set(ARCHITECTURES)
    for architecture, url in IMAGENET_URLS.items():
        assert url.rpartition("/")[2].startswith(architecture.partition("_")[0])
        assert len(url.removesuffix(".pth").rpartition("-")[2]) == 8


def test_a_run_of_another_architecture_is_refused_by_name(tmp_path):
    """What it is and what was expected, in one line; CheXNet is a DenseNet121 only."""
    (tmp_path / "model").mkdir()
    save_model(
        Classifier(Network(architecture="squeezenet1_1"), ["a", "b"], 32), tmp_path / "model"
    )
    weights = read_weights(str(tmp_path))
    with torch.device("meta"):
        resnet = Classifier(Network(architecture="resnet18"), ["a", "b"], 32)
    with pytest.raises(CxrdistError, match=r"those of a ResNet18, .* of a SqueezeNet 1\.1; give"):
        apply_weights(weights, resnet)
    with pytest.raises(CxrdistError, match=r"chexnet: is a DenseNet121, .* is resnet18; choose"):
        read_weights("chexnet", architecture="resnet18")


def test_a_saved_model_says_which_network_it_is(tmp_path):
    """Its logits are the same after loading; a model.json of before, without the field, too."""
    (tmp_path / "model").mkdir()
    for shape in (Network(architecture="squeezenet1_1"), Network(4, (1, 1, 1, 1))):
        model = Classifier(shape, ["a", "b"], 32).eval()
        save_model(model, tmp_path / "model")
        file = tmp_path / "model" / "model.json"
        if shape.is_densenet:
            written = file.read_text()
            file.write_text(written.replace('"architecture": "densenet121",', ""))
            assert file.read_text() != written
        loaded = load_model(tmp_path)
        assert loaded.shape == shape
        images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
        assert torch.equal(loaded(images), model(images))


def test_random_weights_are_shown_without_a_hash(shards, tmp_path, capsys):
    """They have no file, and so nothing that a hash would be of."""
    model = make_model()
    model.origin = {"source": "random", "sha256": None}
    assert main(["weights", "show", str(make_model_run(tmp_path / "run", model, shards))]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["made", "from", "random"]


def test_weights_of_each_architecture_are_shown_and_converted(tmp_path, capsys):
    """`weights show` names the network; what `convert` writes is read again as the same."""
    file, out = tmp_path / "w.pth", tmp_path / "o.safetensors"
    torch.save(library_network("squeezenet1_1", 5).state_dict(), file)
    assert main(["weights", "show", str(file)]) == 0
    said = capsys.readouterr().out
    for text in ("SqueezeNet 1.1", "50 without the head, none missing", "outputs     5"):
        assert text in said
    assert main(["weights", "convert", str(file), str(out)]) == 0
    before, after = read_weights(str(file)), read_weights(str(out))
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())
    assert after.head.keys() == before.head.keys() == {"classifier.1.weight", "classifier.1.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "resnet19"}, r"'resnet19', expected one of densenet121, .*convnext_atto"),
        (
            {"architecture": "alexnet", "growth_rate": 32},
            "growth_rate: is for DenseNets, .*alex",
        ),
        ({"architecture": "resnet18", "block_config": (1, 1, 1, 1)}, "block_config: is for Dense"),
        ({"architecture": "densenet201", "growth_rate": 0}, "growth_rate: has 0, expected 1 to"),
    ],
)
def test_a_network_that_does_not_exist_is_refused(options, message):
    """An unknown name lists what there is; the shape of a DenseNet is for DenseNets."""
    with pytest.raises(CxrdistError, match=message):
        Network(**options)


def test_one_channel_is_for_networks_that_take_it():
    """Torchxrayvision's weights have one; a model.json that claims so is refused."""
    with pytest.raises(CxrdistError, match="alexnet takes images of 3 channels"):
        build_network(Network(architecture="alexnet"), 2, 1)
