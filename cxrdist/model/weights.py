"""Weights to start from: published checkpoints of DenseNet121, read strictly."""

import hashlib
import pickle
import re
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import DenseNet121_Weights

from cxrdist.errors import CxrdistError
from cxrdist.model.densenet import Classifier, Normalisation

# torchxrayvision scales grey values to (2x - 1) * 1024 and feeds one channel.
ONE_CHANNEL = Normalisation(mean=(0.5,), std=(1 / 2048,))

_PREFIX = re.compile(r"^(module\.)?(densenet121\.|model\.|backbone\.)?")
_OLD_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")


@dataclass(frozen=True)
class InitialWeights:
    """Tensors by their names in torchvision's DenseNet121, and where they come from.

    Attributes:
        tensors: state of the network without its head; empty for random weights.
        source: for people: a URL, a file, or "random".
        sha256: of the file, None for random weights.
    """

    tensors: dict[str, Tensor]
    source: str
    sha256: str | None

    @property
    def normalisation(self) -> Normalisation:
        """What the first convolution expects: ImageNet's, or torchxrayvision's one channel."""
        first = self.tensors.get("features.conv0.weight")
        return ONE_CHANNEL if first is not None and first.shape[1] == 1 else Normalisation()


def read_weights(init: str) -> InitialWeights:
    """Read what `--init` names.

    Args:
        init: ``imagenet``, ``none``, or a file.

    Raises:
        CxrdistError: the file is missing, unreadable or of no known layout, or the download failed.
    """
    if init == "none":
        return InitialWeights({}, "random", None)
    if init == "imagenet":
        url = DenseNet121_Weights.IMAGENET1K_V1.url
        return _read_file(download(url), url)
    return _read_file(Path(init), init)


def download(url: str) -> Path:
    """Fetch a checkpoint into torch's hub cache, checked against the hash in its name.

    Raises:
        CxrdistError: the host cannot be reached, or the file is not the published one.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if file.is_file():
        return file
    prefix = re.search(r"-([0-9a-f]{8,})\.", file.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(file), prefix.group(1) if prefix else None)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise CxrdistError(
            f"--init imagenet: {url} could not be fetched ({error}); fetch it on a machine with "
            f"internet and put it at {file}, or use --init none"
        ) from error
    return file


def apply_weights(weights: InitialWeights, model: Classifier) -> int:
    """Copy the weights into all of the network but its head, which stays as it is.

    Returns:
        How many tensors were copied; 0 for random weights.

    Raises:
        CxrdistError: a tensor is missing, left over, or of another shape.
    """
    if not weights.tensors:
        return 0
    own = {k: v for k, v in model.network.state_dict().items() if not k.startswith("classifier.")}
    given = weights.tensors
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    missing = sorted(own.keys() - given.keys() - counters)
    extra = sorted(given.keys() - own.keys())
    shapes = sorted(n for n in own.keys() & given.keys() if own[n].shape != given[n].shape)
    for problem, names in (("lacks", missing), ("has no place for", extra)):
        if names:
            raise CxrdistError(
                f"--init {weights.source}: the network {problem} {_few(names)}; expected the "
                "weights of a DenseNet of the recipe's shape (DenseNet121 unless it says otherwise)"
            )
    if shapes:
        name = shapes[0]
        raise CxrdistError(
            f"--init {weights.source}: {len(shapes)} tensors have wrong shapes, {name} is "
            f"{list(given[name].shape)}, expected {list(own[name].shape)}; give weights of a "
            "DenseNet of the recipe's shape"
        )
    model.network.load_state_dict(given, strict=False)
    return len(given)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _read_file(file: Path, source: str) -> InitialWeights:
    if not file.is_file():
        raise CxrdistError(
            f"--init {source}: no such file; expected imagenet, none, or a checkpoint file"
        )
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CxrdistError(
            f"--init {source}: holds pickled Python objects, which could run code; save "
            "its state dict alone: torch.save(model.state_dict(), FILE)"
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, SafetensorError) as error:
        raise CxrdistError(
            f"--init {source}: no readable checkpoint ({str(error).splitlines()[0]:.100}); "
            "fetch the file again"
        ) from error
    with open(file, "rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    return InitialWeights(_rename(_state_dict(content, source)), source, digest)


def _state_dict(content: Any, source: str) -> dict[str, Tensor]:
    """Find the tensors in a bare state dict or under `state_dict` or `model`."""
    if isinstance(content, dict):
        for state in (content.get("state_dict"), content.get("model"), content):
            if isinstance(state, dict) and state:
                tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
                if len(tensors) == len(state):
                    return tensors
    raise CxrdistError(
        f"--init {source}: holds no state dict (tensors by name), alone or under the names "
        "state_dict or model; save one with torch.save(model.state_dict(), FILE)"
    )


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of torchvision's current DenseNet121 from any published layout, without the head."""
    renamed = {}
    for name, tensor in state.items():
        name = _OLD_DENSE_LAYER.sub(r"\1\2.", _PREFIX.sub("", name))
        if name != "op_threshs" and not name.startswith("classifier."):
            renamed[name] = tensor
    return renamed
