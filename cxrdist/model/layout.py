"""Layouts: recognise a network or its published copy by the names and shapes of its tensors."""

import re
from dataclasses import asdict, dataclass
from typing import cast, get_args

import torch
from torch import Tensor

from cxrdist.config import DENSENETS, Architecture, Network
from cxrdist.data.chestxray14 import LABELS
from cxrdist.errors import CxrdistError
from cxrdist.info import WeightsInfo
from cxrdist.model.description import Normalisation
from cxrdist.model.networks import build_network, output_layer
from cxrdist.model.tensorfile import TensorFile
from cxrdist.terminal import few

# torchxrayvision scales grey values to (2x - 1) * 1024 and feeds one channel.
ONE_CHANNEL = Normalisation(mean=(0.5,), std=(1 / 2048,))
# torchxrayvision.datasets.default_pathologies.
TORCHXRAYVISION_LABELS = [
    *("Atelectasis", "Consolidation", "Infiltration", "Pneumothorax", "Edema", "Emphysema"),
    *("Fibrosis", "Effusion", "Pneumonia", "Pleural_Thickening", "Cardiomegaly", "Nodule", "Mass"),
    *("Hernia", "Lung Lesion", "Fracture", "Lung Opacity", "Enlarged Cardiomediastinum"),
]
IMAGENET_CLASSES = 1000

# Of DataParallel, then of arnoweng's CheXNet, Lightning and other wrappers.
_PREFIX = re.compile(r"^(module\.)?(densenet121\.|model\.|backbone\.)?")
# In torchvision's files, which are older than PyTorch's ban on dots in the names of modules.
_OLD_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")
_CONV2 = re.compile(r"features\.denseblock([1-4])\.denselayer(\d{1,3})\.conv2\.weight")


@dataclass(frozen=True)
class InitialWeights:
    """Tensors by their names in torchvision's or timm's network, and where they come from.

    Attributes:
        tensors: the network without its head; empty for random weights.
        head: weight and bias of the output layer as published, such as ``classifier.weight`` and
            ``classifier.bias``; empty if there is none. They are not used in training.
        normalisation: that the network was trained with.
        labels: of the head's outputs in order; None if not known.
        record: for run.json and model.json: source, sha256, layout, and for a run its shards and
            its own initial weights.
    """

    tensors: dict[str, Tensor]
    head: dict[str, Tensor]
    normalisation: Normalisation
    labels: list[str] | None
    record: WeightsInfo

    @property
    def source(self) -> str:
        """Return the source for messages: a URL, a file, a run, or "random"."""
        return self.record["source"]

    @property
    def channels(self) -> int:
        """Return the number of input channels of the first convolution."""
        return len(self.normalisation.mean)

    def describe(self, num_tensors: int) -> WeightsInfo:
        """Return the description of the weights, with the number of tensors that were copied."""
        return {
            **self.record,
            "tensors": num_tensors,
            "normalisation": asdict(self.normalisation),
            "labels": self.labels,
        }


def recognise(file: TensorFile, where: str, origin: WeightsInfo) -> InitialWeights:
    """Rename the tensors of a checkpoint, and recognise its layout or raise CxrdistError.

    ``where``, the option and its value, begins the error line; ``origin`` has source and sha256.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        new = torchvision_name(name)
        if new in renamed:
            raise CxrdistError(f"{where}: contains two tensors {new}; expected one network")
        renamed[new] = tensor
    # torchxrayvision stores its operating points beside the weights.
    thresholds = renamed.pop("op_threshs", None)
    network = _network_of(renamed)
    # Heads of all DenseNets have the names of the default network's.
    head = {k: renamed.pop(k) for k in head_names(network or Network()) if k in renamed}
    channels = _channels(renamed, where)
    normalisation = ONE_CHANNEL if channels == 1 else Normalisation()
    num_outputs = next((len(tensor) for tensor in head.values() if tensor.dim()), 0)
    if file.note:
        layout, labels = file.note["layout"], file.note.get("labels")
        normalisation = file.note["normalisation"]
    else:
        layout, labels = _identify(file, network, num_outputs, thresholds, channels)
    _check_head(head, labels, where)
    if thresholds is not None and head and thresholds.numel() != num_outputs:
        raise CxrdistError(
            f"{where}: {thresholds.numel()} thresholds (op_threshs) for {num_outputs} outputs; "
            "fetch the file again"
        )
    if len(normalisation.mean) != channels:
        raise CxrdistError(
            f"{where}: its normalisation has {len(normalisation.mean)} channels, expected "
            f"{channels}; convert the file again"
        )
    record: WeightsInfo = {**origin, "layout": layout}
    if file.note:
        record["started_from"] = file.note.get("started_from")
    return InitialWeights(renamed, head, normalisation, labels, record)


def head_names(network: Network) -> tuple[str, str]:
    """Return the names of the weight and the bias of a network's output layer."""
    layer = output_layer(network)
    return f"{layer}.weight", f"{layer}.bias"


def _network_of(tensors: dict[str, Tensor]) -> Network | None:
    """Return the network with these tensor names; None for DenseNets and unknown networks."""
    if any(map(_CONV2.fullmatch, tensors)):
        return None
    for architecture in get_args(Architecture):
        if architecture not in DENSENETS:
            network = Network(architecture=architecture)
            trunk, _ = _trunk_and_head(network)
            if tensors.keys() >= set(_required(trunk)):
                return network
    return None


def _required(trunk: dict[str, Tensor]) -> list[str]:
    """List the names that each file has; before PyTorch 0.4.1 there was no num_batches_tracked."""
    return [name for name in trunk if not name.endswith("num_batches_tracked")]


def _trunk_and_head(
    network: Network, channels: int = 3
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state of a network without its output layer, and of that layer, as meta tensors.

    The layer has one output.
    """
    with torch.device("meta"):
        trunk = build_network(network, 1, channels).state_dict()
    return trunk, {name: trunk.pop(name) for name in head_names(network)}


def torchvision_name(name: str) -> str:
    """Return the name that a tensor has in torchvision's current DenseNet121."""
    name = _OLD_DENSE_LAYER.sub(r"\1\2.", _PREFIX.sub("", name))
    return re.sub(r"^classifier\.0\.", "classifier.", name)


def _channels(tensors: dict[str, Tensor], where: str) -> int:
    """Return the input channels of the first convolution; 3 if missing (`check_fit` reports it)."""
    first = tensors.get("features.conv0.weight")
    if first is None or first.dim() != 4:
        return 3
    if first.shape[1] not in (1, 3):
        raise CxrdistError(
            f"{where}: the first convolution takes {first.shape[1]} channels, expected 1 "
            "(torchxrayvision) or 3; give weights of a network for grey or colour images"
        )
    return int(first.shape[1])


def _identify(
    file: TensorFile,
    network: Network | None,
    num_outputs: int,
    thresholds: Tensor | None,
    channels: int,
) -> tuple[str, list[str] | None]:
    """Return the name of the layout, and the labels of its outputs if known.

    Without a network (`_network_of`), the names of layouts are those of DenseNets.
    """
    if network is not None:
        is_imagenet = num_outputs == IMAGENET_CLASSES
        return (f"ImageNet, {network.title}", None) if is_imagenet else (network.title, file.labels)
    # CheXNet's head is followed by a sigmoid in a Sequential. jrzech pickled the whole network.
    if any(name.endswith("classifier.0.weight") for name in file.tensors):
        repository = "jrzech/reproduce-chexnet" if file.is_network else "arnoweng/CheXNet"
        return f"CheXNet, as in {repository}", [*LABELS]
    if channels == 1:
        default = TORCHXRAYVISION_LABELS if num_outputs == len(TORCHXRAYVISION_LABELS) else None
        labels = file.labels or default
        known = thresholds is not None or labels is not None
        return "torchxrayvision" if known else "one channel, taken for torchxrayvision's", labels
    if num_outputs == IMAGENET_CLASSES:
        old = any(_OLD_DENSE_LAYER.search(name) for name in file.tensors)
        return f"ImageNet, as in torchvision{'' if old else ' and timm'}", None
    return "DenseNet", file.labels


def _check_head(head: dict[str, Tensor], labels: list[str] | None, where: str) -> None:
    """Raise CxrdistError if weight, bias and labels of a head do not belong together."""
    if not head:
        return
    weight, bias = (
        next((tensor for name, tensor in head.items() if name.endswith(end)), None)
        for end in (".weight", ".bias")
    )
    if weight is None or bias is None or weight.dim() < 2 or bias.shape != weight.shape[:1]:
        raise CxrdistError(
            f"{where}: the head's weight and bias do not belong together; fetch the file again"
        )
    if labels is not None and len(labels) != len(weight):
        raise CxrdistError(
            f"{where}: the head has {len(weight)} outputs, expected {len(labels)} "
            "as in the published layout with these names; name other heads `classifier`"
        )


def shape_of(tensors: dict[str, Tensor], where: str) -> Network:
    """Return the known network, or DenseNet of any shape, with these tensors; reject others."""
    network = _network_of(tensors)
    if network is not None:
        return network
    matches = [(_CONV2.fullmatch(name), tensor) for name, tensor in tensors.items()]
    convs = [(int(m[1]), int(m[2]), tensor) for m, tensor in matches if m and tensor.dim() == 4]
    layers = [
        max((layer for b, layer, _ in convs if b == block), default=0) for block in range(1, 5)
    ]
    expected = ", ".join(get_args(Architecture))
    if not all(layers):
        raise CxrdistError(
            f"{where}: the names of its {len(tensors)} tensors are not those of a known network; "
            f"give weights of {expected}"
        )
    first, second, third, fourth = layers
    growth_rate, block_config = int(convs[0][2].shape[0]), (first, second, third, fourth)
    published = [name for name, shape in DENSENETS.items() if shape == (growth_rate, block_config)]
    # A DenseNet of another shape is a densenet121 with a growth rate and layers of its own.
    architecture = cast(Architecture, published[0]) if published else "densenet121"
    try:
        return Network(growth_rate, block_config, architecture=architecture)
    except CxrdistError as error:
        raise CxrdistError(f"{where}: {error}; give weights of {expected}") from None


def check_fit(weights: InitialWeights, shape: Network, where: str) -> None:
    """Raise CxrdistError unless weights are exactly those of a network, with any outputs or none.

    `where` is the option and its value, for the error line.
    """
    given = weights.tensors
    own, own_head = _trunk_and_head(shape, weights.channels)
    missing = [k for k in _required(own) if k not in given]
    extra = [k for k in given if k not in own]
    wrong = [k for k in own if k in given and own[k].shape != given[k].shape]
    expected = f"expected those of a {shape.title}{_other(given, shape)}"
    for problem, names in (("the file lacks", missing), ("the network does not have", extra)):
        if names:
            raise CxrdistError(f"{where}: {problem} {few(sorted(names), 3)}; {expected}")
    if wrong:
        name = wrong[0]
        raise CxrdistError(
            f"{where}: {len(wrong)} tensors have wrong shapes, {name} is "
            f"{list(given[name].shape)}, expected {list(own[name].shape)}; {expected}"
        )
    for name, tensor in weights.head.items():
        if tensor.shape[1:] != own_head[name].shape[1:]:
            takes, has = (" x ".join(map(str, t.shape[1:])) for t in (tensor, own_head[name]))
            raise CxrdistError(
                f"{where}: the head takes {takes} features, but the network has {has}; "
                "fetch the file again"
            )


def _other(tensors: dict[str, Tensor], shape: Network) -> str:
    """Return a note for the error line if the tensors are those of another known network."""
    try:
        actual = shape_of(tensors, "")
    except CxrdistError:
        return ""
    if actual.title == shape.title:
        return ""
    return (
        f", but these are of a {actual.title}; give other weights or another network.architecture"
    )
