import functools
import http.server
import re
import threading

import pytest
import torch
from safetensors.torch import save_file

from cxrdist.config import Network
from cxrdist.errors import CxrdistError
from cxrdist.model.densenet import Classifier, Normalisation
from cxrdist.model.weights import ONE_CHANNEL, apply_weights, download, read_weights

SMALL = Network(growth_rate=4, block_config=(2, 2, 2, 2))


def donor(channels: int = 3, num_classes: int = 14) -> dict[str, torch.Tensor]:
    normalisation = Normalisation() if channels == 3 else ONE_CHANNEL
    classes = [str(i) for i in range(num_classes)]
    return Classifier(SMALL, classes, 32, normalisation).network.state_dict()


def old_names(state):
    """Names of torchvision's file and of the 2017 copies of CheXNet: norm.1 for norm1."""
    return {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): tensor
        for name, tensor in state.items()
    }


LAYOUTS = {
    "torchvision.pth": old_names,
    "timm.safetensors": dict,
    "chexnet-arnoweng.pth.tar": lambda state: {
        "epoch": 1,
        "state_dict": {
            f"module.densenet121.{name.replace('classifier.', 'classifier.0.')}": tensor
            for name, tensor in old_names(state).items()
            if "num_batches_tracked" not in name
        },
    },
    "lightning.pt": lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}},
    "data-parallel.pt": lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
    "torchxrayvision.pt": lambda state: {**state, "op_threshs": torch.zeros(18)},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_published_layout_gives_the_same_tensors(tmp_path, name):
    """All of the trunk is copied bit for bit, the head stays new."""
    channels = 1 if name.startswith("torchxrayvision") else 3
    state = donor(channels)
    content = LAYOUTS[name](state)
    (save_file if name.endswith("safetensors") else torch.save)(content, tmp_path / name)
    weights = read_weights(str(tmp_path / name))
    model = Classifier(SMALL, ["a", "b", "c"], 32, weights.normalisation)
    head = model.network.classifier.weight.clone()
    copied = apply_weights(weights, model)
    trunk = {k: v for k, v in state.items() if not k.startswith("classifier.")}
    ours = model.network.state_dict()
    assert all(torch.equal(ours[k], v) for k, v in trunk.items() if "tracked" not in k)
    assert copied >= sum("tracked" not in k for k in trunk)
    assert torch.equal(model.network.classifier.weight, head)
    assert len(model.normalisation.mean) == channels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("features.denseblock2.denselayer1.conv1.weight"), "lacks features.denseb"),
        (lambda s: s.update(extra=torch.zeros(1)), "has no place for extra"),
        (
            lambda s: s.update({"features.conv0.weight": torch.zeros(8, 3, 5, 5)}),
            r"features\.conv0\.weight is \[8, 3, 5, 5\], expected \[8, 3, 7, 7\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    """A missing, left-over or misshapen tensor is named; nothing is loaded in part."""
    state = donor()
    change(state)
    torch.save(state, tmp_path / "w.pt")
    model = Classifier(SMALL, ["a", "b"], 32)
    before = {k: v.clone() for k, v in model.network.state_dict().items()}
    with pytest.raises(CxrdistError, match=message):
        apply_weights(read_weights(str(tmp_path / "w.pt")), model)
    assert all(torch.equal(v, before[k]) for k, v in model.network.state_dict().items())


def test_a_pickled_module_is_refused_and_does_not_run(tmp_path):
    """Only tensors are read; objects that could run code are not."""

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Payload()}, tmp_path / "w.pt")
    with pytest.raises(CxrdistError, match="pickled Python objects"):
        read_weights(str(tmp_path / "w.pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors", "text.pt", "list.pt", "lost.pt"])
def test_files_without_weights_are_refused(tmp_path, name):
    """A truncated file, a text, a list, and no file at all are one clear error each."""
    file = tmp_path / name
    if name.startswith("cut"):
        (save_file if name.endswith("safetensors") else torch.save)(donor(), file)
        file.write_bytes(file.read_bytes()[:2000])
    elif name == "text.pt":
        file.write_text("not weights")
    elif name == "list.pt":
        torch.save([torch.zeros(1)], file)
    with pytest.raises(CxrdistError, match=f"--init .*{name}"):
        read_weights(str(file))


@pytest.fixture
def server(tmp_path):
    """A web server on this machine that serves tmp_path / "web"."""
    (tmp_path / "web").mkdir()
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "web")
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_download_is_checked_and_kept(tmp_path, server, monkeypatch):
    """A file is fetched once, under the hash in its name; another content is refused."""
    import hashlib

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    data = b"weights" * 1000
    digest = hashlib.sha256(data).hexdigest()[:8]
    web = tmp_path / "web" / f"densenet121-{digest}.pth"
    web.write_bytes(data)
    kept = download(f"{server}/{web.name}")
    assert kept.read_bytes() == data
    web.unlink()
    assert download(f"{server}/{web.name}") == kept
    (tmp_path / "web" / "densenet121-00000000.pth").write_bytes(data)
    with pytest.raises(CxrdistError, match="could not be fetched"):
        download(f"{server}/densenet121-00000000.pth")


def test_offline_it_says_where_to_put_the_file(tmp_path, server, monkeypatch):
    """Without the host, the message names the URL and the exact place for the file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with pytest.raises(CxrdistError) as error:
        download(f"{server}/densenet121-a639ec97.pth")
    place = tmp_path / "home" / "hub" / "checkpoints" / "densenet121-a639ec97.pth"
    assert str(place) in str(error.value)
    assert f"{server}/densenet121-a639ec97.pth" in str(error.value)
