import json
import re
import struct

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from cxrdist.cli import main
from cxrdist.config import Network
from cxrdist.data.chestxray14 import LABELS
from cxrdist.errors import CxrdistError
from cxrdist.files import write_json
from cxrdist.model.densenet import Classifier, Normalisation
from cxrdist.model.layout import (
    ONE_CHANNEL,
    TORCHXRAYVISION_LABELS,
    check_fit,
    shape_of,
)
from cxrdist.model.weights import apply_weights, read_weights

SMALL = Network(growth_rate=4, block_config=(2, 2, 2, 2))


def torchvision_network(num_classes: int = 14) -> nn.Module:
    """The class of torchvision, small, with running statistics that are not the new ones."""
    torch.manual_seed(num_classes)
    network = torchvision.models.DenseNet(4, (2, 2, 2, 2), 8, num_classes=num_classes)
    return randomise(network)


def randomise(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return network.eval()


def with_sigmoid(network: nn.Module) -> nn.Module:
    """The head of the published CheXNet copies."""
    network.classifier = nn.Sequential(network.classifier, nn.Sigmoid())
    return network


def xray_network(**options) -> nn.Module:
    """The class of torchxrayvision, small."""
    models = pytest.importorskip("torchxrayvision.models")
    options = {"growth_rate": 4, "block_config": (2, 2, 2, 2), "num_init_features": 8, **options}
    return randomise(models.DenseNet(**options))


def old_names(state):
    """Names of torchvision's file and of the 2017 copies of CheXNet: norm.1 for norm1."""
    return {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): tensor
        for name, tensor in state.items()
    }


def old_modules(network: nn.Module) -> nn.Module:
    """A network as torchvision 0.2 made it: its dense layers have modules named `norm.1`."""
    for module in network.modules():
        children = module._modules
        for name in list(children):
            children[re.sub(r"^(norm|relu|conv)([12])$", r"\1.\2", name)] = children.pop(name)
    return network


class Wrapped(nn.Module):
    """arnoweng's class: the network is its attribute densenet121."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.densenet121 = network


def as_arnoweng(network):
    state = nn.DataParallel(Wrapped(with_sigmoid(network))).state_dict()
    without = {k: v for k, v in old_names(state).items() if "num_batches_tracked" not in k}
    return {"epoch": 1, "state_dict": without, "best_loss": 0.1}


def as_jrzech(network, old=False):
    network = with_sigmoid(network)
    network = old_modules(network) if old else network
    return {"model": network, "best_loss": 0.1, "rng_state": torch.get_rng_state(), "LR": 0.01}


CHEXNET = "CheXNet, as in "
LAYOUTS = {
    "torchvision.pth": (lambda n: old_names(n.state_dict()), "DenseNet"),
    "timm.safetensors": (lambda n: n.state_dict(), "DenseNet"),
    "chexnet-arnoweng.pth.tar": (as_arnoweng, f"{CHEXNET}arnoweng/CheXNet"),
    "chexnet-jrzech": (as_jrzech, f"{CHEXNET}jrzech/reproduce-chexnet"),
    "chexnet-jrzech-2018": (
        lambda n: as_jrzech(n, old=True),
        f"{CHEXNET}jrzech/reproduce-chexnet",
    ),
    "lightning.pt": (
        lambda n: {"state_dict": {f"model.{k}": v for k, v in n.state_dict().items()}},
        "DenseNet",
    ),
    "data-parallel.pt": (lambda n: {"model": nn.DataParallel(n).state_dict()}, "DenseNet"),
    "data-parallel-pickled.pt": (nn.DataParallel, "DenseNet"),
    "backbone.pt": (
        lambda n: {f"module.backbone.{k}": v for k, v in n.state_dict().items()},
        "DenseNet",
    ),
}


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_published_layout_gives_the_same_tensors(tmp_path, name, new):
    """From both containers: the trunk and the head bit for bit; in training the head stays new."""
    make, layout = LAYOUTS[name]
    expected = {k: v.clone() for k, v in torchvision_network().state_dict().items()}
    content, file = make(torchvision_network()), tmp_path / name
    if name.endswith("safetensors"):
        save_file(content, file)
    else:
        torch.save(content, file, _use_new_zipfile_serialization=new)
    weights = read_weights(str(file))
    found = {**weights.tensors, **weights.head}
    given = {k for k in expected if k in found or "num_batches_tracked" not in k}
    assert found.keys() == given
    assert all(torch.equal(found[k], expected[k]) for k in given)
    assert weights.record["layout"] == layout
    assert weights.labels == ([*LABELS] if layout.startswith(CHEXNET) else None)
    assert weights.normalisation == Normalisation()
    model = Classifier(SMALL, ["a", "b", "c"], 32, weights.normalisation)
    head = model.network.classifier.weight.clone()
    assert apply_weights(weights, model) == len(weights.tensors) == len(given) - 2
    ours = model.network.state_dict()
    assert all(torch.equal(ours[k], v) for k, v in weights.tensors.items())
    assert torch.equal(model.network.classifier.weight, head)
    assert model.origin["sha256"] == weights.record["sha256"]


@pytest.mark.parametrize("pickled", [True, False])
def test_torchxrayvisions_networks_take_one_channel(tmp_path, pickled):
    """Its pickled network and its state dict, with the thresholds as a buffer: 18 labels."""
    network = xray_network(op_threshs=torch.rand(18))
    torch.save(network if pickled else network.state_dict(), tmp_path / "w.pt")
    weights = read_weights(str(tmp_path / "w.pt"))
    assert weights.record["layout"] == "torchxrayvision"
    assert weights.labels == TORCHXRAYVISION_LABELS == type(network).targets
    assert weights.normalisation == ONE_CHANNEL
    state = network.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in {**weights.tensors, **weights.head}.items())


def logits_of(weights, images: torch.Tensor, shape: Network) -> torch.Tensor:
    """Logits of a checkpoint with its own head, through the package's network."""
    classes = [str(i) for i in range(len(weights.head["classifier.bias"]))]
    model = Classifier(shape, classes, images.shape[-1], weights.normalisation).eval()
    apply_weights(weights, model)
    model.network.classifier.load_state_dict(
        {k.removeprefix("classifier."): v for k, v in weights.head.items()}
    )
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("library", ["torchvision", "timm", "torchxrayvision"])
def test_the_logits_are_those_of_the_library(tmp_path, library):
    """DenseNet121 as the library makes, saves and feeds it: the same logits to 1e-5."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    if library == "torchxrayvision":
        models = pytest.importorskip("torchxrayvision.models")
        network = randomise(models.DenseNet())
        utils = pytest.importorskip("torchxrayvision.utils")
        inputs = torch.from_numpy(utils.normalize(images.numpy(), 255)).float()
        torch.save(network, tmp_path / "w")
    else:
        preset = torchvision.models.DenseNet121_Weights.IMAGENET1K_V1.transforms()
        mean, std = preset.mean, preset.std
        if library == "torchvision":
            network = randomise(torchvision.models.densenet121())
            torch.save(network.state_dict(), tmp_path / "w")
        else:
            network = randomise(timm.create_model("densenet121.ra_in1k"))
            mean, std = network.default_cfg["mean"], network.default_cfg["std"]
            save_file(network.state_dict(), tmp_path / "w")
        colour = images.expand(-1, 3, -1, -1) / 255
        inputs = torchvision.transforms.functional.normalize(colour, mean, std)
    weights = read_weights(str(tmp_path / "w"))
    with torch.no_grad():
        expected = network(inputs)
    found = logits_of(weights, images, Network())
    assert expected.std() > 0.01
    assert (found - expected).abs().max() <= 1e-5 * max(1, float(expected.abs().max()))


def damaged(change: str) -> dict[str, torch.Tensor]:
    """The layout of arnoweng with one thing wrong."""
    content = as_arnoweng(torchvision_network(13 if change == "head of 13" else 14))
    state = content["state_dict"]
    prefix = "module.densenet121."
    if change == "missing block":
        for name in [n for n in state if "denseblock2" in n]:
            del state[name]
    elif change == "missing tensor":
        del state[f"{prefix}features.norm5.weight"]
    elif change == "extra tensor":
        state["extra"] = torch.zeros(1)
    elif change == "extra head":
        state[f"{prefix}classifier.2.weight"] = torch.zeros(1)
    elif change == "wrong shape":
        state[f"{prefix}features.conv0.weight"] = torch.zeros(8, 3, 5, 5)
    elif change == "two channels":
        state[f"{prefix}features.conv0.weight"] = torch.zeros(8, 2, 7, 7)
    elif change == "head of other features":
        state[f"{prefix}classifier.0.weight"] = torch.zeros(14, 5)
    elif change == "head of a convolution":
        state[f"{prefix}classifier.0.weight"] = torch.zeros(14, 16, 1, 1)
    elif change == "head without bias":
        del state[f"{prefix}classifier.0.bias"]
    elif change == "twice":
        state["features.norm0.weight"] = torch.zeros(8)
    elif change == "nan":
        state[f"{prefix}features.norm0.weight"][3] = float("nan")
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing block", r"the file lacks features\.denseblock2\..* and \d+ more"),
        ("missing tensor", r"the file lacks features\.norm5\.weight;"),
        ("extra tensor", "the network does not have extra;"),
        ("extra head", r"does not have classifier\.2\.weight"),
        ("wrong shape", r"features\.conv0\.weight is \[8, 3, 5, 5\], expected \[8, 3, 7, 7\]"),
        ("two channels", "takes 2 channels, expected 1"),
        ("head of 13", "the head has 13 outputs, expected 14"),
        ("head of other features", "the head takes 5 features, but the network has"),
        ("head of a convolution", "the head takes 16 x 1 x 1 features, but the network has 16;"),
        ("head without bias", "weight and bias do not belong together"),
        ("twice", r"contains two tensors features\.norm0\.weight"),
        ("nan", r"features\.norm0\.weight contains numbers that are not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    """What is wrong is named; nothing is loaded in part."""
    torch.save(damaged(change), tmp_path / "w.pt")
    model = Classifier(SMALL, ["a", "b"], 32)
    before = {k: v.clone() for k, v in model.network.state_dict().items()}
    with pytest.raises(CxrdistError, match=f"^--init .*w.pt: .*{message}"):
        apply_weights(read_weights(str(tmp_path / "w.pt")), model)
    assert all(torch.equal(v, before[k]) for k, v in model.network.state_dict().items())


def test_a_head_of_other_labels_is_left_out(tmp_path):
    """Weights of five classes of one's own are a start: their head is dropped, its size is free."""
    torch.save(torchvision_network(5).state_dict(), tmp_path / "w.pt")
    weights = read_weights(str(tmp_path / "w.pt"))
    assert weights.labels is None
    assert len(weights.head["classifier.bias"]) == 5


def test_thresholds_of_another_number_are_refused(tmp_path):
    """Those of torchxrayvision are one for each output."""
    torch.save(xray_network(op_threshs=torch.rand(17)), tmp_path / "w.pt")
    with pytest.raises(CxrdistError, match="17 thresholds"):
        read_weights(str(tmp_path / "w.pt"))


def test_an_ensemble_is_refused_by_the_option_that_named_it(tmp_path):
    """The line begins with --init, which was given, and not with --run."""
    (tmp_path / "model").mkdir()
    members = {"format": "cxrdist-ensemble-1", "members": ["member-0", "member-1"]}
    write_json(tmp_path / "model" / "model.json", members)
    with pytest.raises(CxrdistError, match=r"^--init .*: is an ensemble of .* such as .*member-0$"):
        read_weights(str(tmp_path))


CUT = ("cut.pt", "cut-legacy.pt", "cut-pickled.pt", "cut.safetensors")
OTHERS = ("text.pt", "list.pt", "lost.pt", "page.pt", "lfs.pt", "mnasnet.pt", "folder", "script.pt")


@pytest.mark.parametrize("name", [*CUT, *OTHERS])
def test_files_without_weights_are_refused(tmp_path, name):
    """A truncated file, a web page, another network, an empty folder: one line each."""
    file = tmp_path / name
    network = torchvision_network()
    if name in CUT:
        if name.endswith("safetensors"):
            save_file(network.state_dict(), file)
        else:
            content = network if "pickled" in name else network.state_dict()
            torch.save(content, file, _use_new_zipfile_serialization="legacy" not in name)
        whole = file.read_bytes()
        for kept in (0, 7, 100, 2000, len(whole) // 2, len(whole) - 30):
            file.write_bytes(whole[:kept])
            with pytest.raises(CxrdistError, match=f"--init .*{name}: not a readable checkpoint"):
                read_weights(str(file))
        return
    if name == "folder":
        file.mkdir()
    elif name == "list.pt":
        torch.save([torch.zeros(1)], file)
    elif name == "mnasnet.pt":
        torch.save(torchvision.models.mnasnet0_5().state_dict(), file)
    elif name == "script.pt":
        torch.jit.script(nn.Linear(1, 1)).save(file)
    elif name != "lost.pt":
        begin = {
            "page.pt": "<!DOCTYPE html>",
            "lfs.pt": "version https://git-lfs.github.com/spec/v1",
        }
        file.write_text(begin.get(name, "not weights"))
    reason = {
        "lost.pt": "no such file",
        "page.pt": "a web page",
        "lfs.pt": "a Git LFS pointer",
        "mnasnet.pt": "not those of a known network",
        "folder": "without a trained model",
        "script.pt": "TorchScript",
        "text.pt": "neither safetensors nor",
        "list.pt": "no state dict or network",
    }[name]
    with pytest.raises(CxrdistError, match=f"--init .*{name}: .*{reason}"):
        read_whole(file)


def read_whole(file):
    """Read a file as a DenseNet of the shape that it has itself."""
    weights, where = read_weights(str(file)), f"--init {file}"
    check_fit(weights, shape_of(weights.tensors, where), where)


def test_a_flipped_bit_is_found(tmp_path):
    """A file of torch.save has a checksum for each tensor; PyTorch does not look at it."""
    file = tmp_path / "w.pt"
    torch.save(torchvision_network().state_dict(), file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CxrdistError, match="Bad CRC-32"):
        read_weights(str(file))


def test_convert_writes_what_any_library_reads_and_keeps_what_is_known(tmp_path):
    """Other libraries load the file strictly; labels, scale and source are still known."""
    torch.save(as_jrzech(torchvision_network()), tmp_path / "checkpoint")
    out = tmp_path / "w.safetensors"
    arguments = ["weights", "convert", str(tmp_path / "checkpoint"), str(out)]
    assert main(arguments) == 0
    torchvision_network().load_state_dict(load_file(out))
    before, after = read_weights(str(tmp_path / "checkpoint")), read_weights(str(out))
    assert after.labels == before.labels == [*LABELS]
    assert after.normalisation == before.normalisation
    assert after.record["layout"] == before.record["layout"]
    assert after.record["started_from"]["sha256"] == before.record["sha256"]


def test_convert_writes_a_file_once(tmp_path, capsys):
    """The same command finds its file; another content is kept: other weights or any file."""
    out = tmp_path / "w.safetensors"
    for number in (0, 1):
        torch.manual_seed(number)
        torch.save(as_jrzech(torchvision_network()), tmp_path / f"{number}")
    assert main(["weights", "convert", str(tmp_path / "0"), str(out)]) == 0
    before = out.read_bytes()
    for _ in range(4):  # safetensors writes the two values of its metadata in any order
        assert main(["weights", "convert", str(tmp_path / "0"), str(out)]) == 0
        assert "w.safetensors: is converted already" in capsys.readouterr().out
    for other in (before, before[:-1], bytes(len(before)), b"x"):
        out.write_bytes(other)
        assert main(["weights", "convert", str(tmp_path / "1"), str(out)]) == 2
        assert "w.safetensors: already exists; choose" in capsys.readouterr().err
        assert out.read_bytes() == other


def test_convert_keeps_one_channel_and_its_scale(tmp_path):
    """A converted network of torchxrayvision is still fed on its own scale."""
    torch.save(xray_network(), tmp_path / "w.pt")
    assert (
        main(["weights", "convert", str(tmp_path / "w.pt"), str(tmp_path / "o.safetensors")]) == 0
    )
    weights = read_weights(str(tmp_path / "o.safetensors"))
    assert weights.normalisation == ONE_CHANNEL
    assert weights.labels == TORCHXRAYVISION_LABELS


def test_show_says_what_a_file_is(tmp_path, capsys):
    """Layout, shape, labels, normalisation, hash; an incomplete file is one line and code 2."""
    torch.save(as_arnoweng(torchvision_network()), tmp_path / "w.pt")
    assert main(["weights", "show", str(tmp_path / "w.pt")]) == 0
    said = capsys.readouterr().out
    for text in (
        *("CheXNet, as in arnoweng/CheXNet", "blocks of 2-2-2-2 layers", "growth rate 4"),
        *("Atelectasis, Cardiomegaly", "0.485, 0.456, 0.406", "none missing or left over"),
    ):
        assert text in said
    torch.save(damaged("missing tensor"), tmp_path / "w.pt")
    assert main(["weights", "show", str(tmp_path / "w.pt")]) == 2
    assert "the file lacks features.norm5.weight" in capsys.readouterr().err


def test_one_channel_of_unknown_origin_is_said_to_be_a_guess(tmp_path):
    """Nothing tells the scale of such a network; the layout's name says what was assumed."""
    network = timm.models.densenet.DenseNet(4, (2, 2, 2, 2), num_classes=5, in_chans=1)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    weights = read_weights(str(tmp_path / "w.pt"))
    assert weights.record["layout"] == "one channel, taken for torchxrayvision's"
    assert weights.labels is None


@pytest.mark.parametrize("note", ["[]", "{", '{"layout": "x"}'])
def test_a_damaged_note_of_convert_is_refused(tmp_path, note):
    """Half of what convert noted would be a wrong normalisation."""
    save_file(torchvision_network().state_dict(), tmp_path / "w.safetensors", {"cxrdist": note})
    with pytest.raises(CxrdistError, match=r"w\.safetensors: cxrdist: .*convert it again"):
        read_weights(str(tmp_path / "w.safetensors"))


def write_safetensors(file, header):
    """A file of safetensors with any header, and zeros as its numbers."""
    ends = [x["data_offsets"][1] for x in header.values()] if isinstance(header, dict) else []
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(max(ends, default=0)))


def entry(shape, kind="F32", num_bytes=0):
    return {"dtype": kind, "shape": shape, "data_offsets": [0, num_bytes]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({f"t{i}": entry([0]) for i in range(20_000)}, "more than 10000 tensors"),
        ({"t": entry([1] * 100_000, num_bytes=4)}, "more than 8 dimensions"),
        ({"t": entry([2**62, 2**62, 0])}, "not a readable checkpoint"),
        ({"t": entry([1], "F8_E4M3", 1)}, "t contains float8_e4m3fn numbers"),
        ({"t": entry([1], "BOOL", 1)}, "t contains bool numbers"),
        (b'{"a":' * 10**5, "not a readable checkpoint"),
        (b"{" + b" " * (5 << 20), "its header has more than 4 MiB"),
    ],
)
def test_the_header_of_safetensors_is_bounded(tmp_path, header, message):
    """Many tensors, many dimensions, other kinds of numbers, deep nesting."""
    write_safetensors(tmp_path / "w.safetensors", header)
    with pytest.raises(CxrdistError, match=message):
        read_weights(str(tmp_path / "w.safetensors"))


NOTE = {
    "layout": "DenseNet",
    "labels": None,
    "normalisation": {"mean": [0.5] * 3, "std": [0.2] * 3},
    "started_from": {"source": "x", "sha256": None},
}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalisation": {"mean": [0.5] * 3, "std": [0.0] * 3}},
        {"normalisation": {"mean": [float("nan")] * 3, "std": [0.2] * 3}},
        {"normalisation": {"mean": [0.5], "std": [0.2]}},
        {"normalisation": {"mean": [0.5] * 2, "std": [0.2] * 3}},
        {"normalisation": None},
        {"layout": 7},
        {"labels": "a,b"},
        {"labels": ["a", 1]},
        {"labels": ["a", "b"]},
        {"started_from": {"source": "x", "started_from": 5}},
        {"started_from": "x"},
    ],
)
def test_a_note_is_not_taken_on_trust(tmp_path, changes):
    """Scale, labels and history of a file that anybody may have written."""
    file, state = tmp_path / "w.safetensors", torchvision_network().state_dict()
    save_file(state, file, {"cxrdist": json.dumps(NOTE)})
    assert read_weights(str(file)).normalisation.std == (0.2, 0.2, 0.2)
    save_file(state, file, {"cxrdist": json.dumps({**NOTE, **changes})})
    with pytest.raises(CxrdistError, match=r"w\.safetensors: "):
        read_weights(str(file))


@pytest.mark.parametrize("name", ["classifier.weight", "classifier.bias", "features.norm5.weight"])
def test_a_tensor_without_dimensions_is_refused(tmp_path, name):
    """Where a list of numbers is expected."""
    state = {**torchvision_network().state_dict(), name: torch.tensor(1.0)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CxrdistError, match=r"w\.pt: "):
        read_whole(tmp_path / "w.pt")


@pytest.mark.parametrize("number", ["999", "1000000000", "9" * 900])
def test_the_number_of_layers_is_bounded(tmp_path, number):
    """A name with a number of a thousand million layers does not build them."""
    state = torchvision_network().state_dict()
    state[f"features.denseblock1.denselayer{number}.conv2.weight"] = torch.zeros(4, 16, 3, 3)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CxrdistError, match=r"w\.pt: "):
        read_whole(tmp_path / "w.pt")
