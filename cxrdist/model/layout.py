"""Layouts: which network or published copy of it a set of tensors is, by names and shapes alone."""

import re
from dataclasses import dataclass
from typing import cast, get_args

import torch
from torch import Tensor

from cxrdist.config import DENSENETS, Architecture, Network
from cxrdist.errors import CxrdistError
from cxrdist.model.description import Normalisation
from cxrdist.model.networks import build_network, output_layer
from cxrdist.model.tensorfile import TensorFile

# torchxrayvision scales grey values to (2x - 1) * 1024 and feeds one channel.
ONE_CHANNEL = Normalisation(mean=(0.5,), std=(1 / 2048,))
# Order of the outputs of the published CheXNet copies (arnoweng/CheXNet, jrzech/reproduce-chexnet).
CHEXNET_LABELS = [
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia"),
    *("Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening"),
    "Hernia",
]
# torchxrayvision.datasets.default_pathologies.
TORCHXRAYVISION_LABELS = [
    *("Atelectasis", "Consolidation", "Infiltration", "Pneumothorax", "Edema", "Emphysema"),
    *("Fibrosis", "Effusion", "Pneumonia", "Pleural_Thickening", "Cardiomegaly", "Nodule", "Mass"),
    *("Hernia", "Lung Lesion", "Fracture", "Lung Opacity", "Enlarged Cardiomediastinum"),
]
IMAGENET_CLASSES = 1000

_PREFIX = re.compile(r"^(module\.)?(densenet121\.|model\.|backbone\.)?")
_OLD_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")
_CONV2 = re.compile(r"features\.denseblock([1-4])\.denselayer(\d{1,3})\.conv2\.weight")


@dataclass(frozen=True)
class Layout:
    """A checkpoint under the names of torchvision, or timm where torchvision lacks the network.

    Attributes:
        name: which published layout it is.
        tensors: the network without its head.
        head: weight and bias of the output layer, such as ``classifier.weight`` and
            ``classifier.bias``; empty if there is no head.
        labels: of the head's outputs in their order; None where they are not known.
        normalisation: what the first convolution expects.
    """

    name: str
    tensors: dict[str, Tensor]
    head: dict[str, Tensor]
    labels: list[str] | None
    normalisation: Normalisation


def recognise(file: TensorFile, where: str) -> Layout:
    """Rename the tensors of a checkpoint, and tell where they are from.

    Args:
        file: the tensors as they stand in the file.
        where: the option and its value, for the error line.

    Raises:
        CxrdistError: two tensors have one name, the first convolution takes neither one channel nor
            three, the head is not that of its layout, or the note of `weights convert` is invalid.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        new = torchvision_name(name)
        if new in renamed:
            raise CxrdistError(f"{where}: holds two tensors {new}; expected one network")
        renamed[new] = tensor
    thresholds = renamed.pop("op_threshs", None)
    network = _network_of(renamed)
    head = {k: renamed.pop(k) for k in head_names(network or Network()) if k in renamed}
    channels = _channels(renamed, where)
    if network is None:
        name, labels = _identify(file, head, thresholds, channels)
    else:
        name, labels = _identify_other(file, head, network)
    _check_head(head, renamed, labels, where)
    if thresholds is not None and head and thresholds.numel() != len(head["classifier.weight"]):
        raise CxrdistError(
            f"{where}: {thresholds.numel()} thresholds (op_threshs) for "
            f"{len(head['classifier.weight'])} outputs; fetch the file again"
        )
    normalisation = ONE_CHANNEL if channels == 1 else Normalisation()
    if file.note:
        normalisation = file.note["normalisation"]
    if len(normalisation.mean) != channels:
        raise CxrdistError(
            f"{where}: its normalisation is not of {channels} channels; convert the file again"
        )
    return Layout(name, renamed, head, labels, normalisation)


def head_names(network: Network) -> tuple[str, str]:
    """Return the names of the weight and the bias of a network's output layer."""
    layer = output_layer(network)
    return f"{layer}.weight", f"{layer}.bias"


def _network_of(tensors: dict[str, Tensor]) -> Network | None:
    """The network that has all these names, or None if there is none but perhaps a DenseNet."""
    if any(map(_CONV2.fullmatch, tensors)):
        return None
    for architecture in get_args(Architecture):
        if architecture not in DENSENETS:
            network = Network(architecture=architecture)
            if trunk_of(network).keys() <= tensors.keys():
                return network
    return None


def trunk_of(network: Network, channels: int = 3) -> dict[str, Tensor]:
    """Parameters and buffers of a network without its head; on the meta device, without values."""
    with torch.device("meta"):
        state = build_network(network, 1, channels).state_dict()
    return {name: tensor for name, tensor in state.items() if name not in head_names(network)}


def torchvision_name(name: str) -> str:
    """Return the name that a tensor has in torchvision's current DenseNet121."""
    name = _OLD_DENSE_LAYER.sub(r"\1\2.", _PREFIX.sub("", name))
    return re.sub(r"^classifier\.0\.", "classifier.", name)


def _channels(tensors: dict[str, Tensor], where: str) -> int:
    """Input channels of the first convolution; 3 where it is missing, which is told elsewhere."""
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
    file: TensorFile, head: dict[str, Tensor], thresholds: Tensor | None, channels: int
) -> tuple[str, list[str] | None]:
    """Return the name of the layout, and the labels of its head where they are known."""
    names = file.tensors
    weight = head.get("classifier.weight")
    num_outputs = weight.shape[0] if weight is not None and weight.dim() == 2 else 0
    if file.note:
        return file.note["layout"], file.note.get("labels")
    if any(name.endswith("classifier.0.weight") for name in names):
        whose = "jrzech/reproduce-chexnet" if "network" in file.holder else "arnoweng/CheXNet"
        return f"CheXNet, as in {whose}", CHEXNET_LABELS
    if channels == 1:
        default = TORCHXRAYVISION_LABELS if num_outputs == len(TORCHXRAYVISION_LABELS) else None
        labels = file.labels or default
        known = thresholds is not None or labels is not None
        return "torchxrayvision" if known else "one channel, taken for torchxrayvision's", labels
    if num_outputs == IMAGENET_CLASSES:
        old = any(_OLD_DENSE_LAYER.search(name) for name in names)
        return f"ImageNet, as in torchvision{'' if old else ' and timm'}", None
    return "DenseNet", file.labels


def _identify_other(
    file: TensorFile, head: dict[str, Tensor], network: Network
) -> tuple[str, list[str] | None]:
    """As `_identify`, of another network than a DenseNet."""
    if file.note:
        return file.note["layout"], file.note.get("labels")
    num_outputs = next((len(tensor) for tensor in head.values() if tensor.dim()), 0)
    if num_outputs == IMAGENET_CLASSES:
        return f"ImageNet, {network.title}", None
    return network.title, file.labels


def _check_head(
    head: dict[str, Tensor], trunk: dict[str, Tensor], labels: list[str] | None, where: str
) -> None:
    """Make sure that a head fits its trunk and its labels.

    Raises:
        CxrdistError: it does not.
    """
    if not head:
        return
    weight, bias = (
        next((tensor for name, tensor in head.items() if name.endswith(end)), None)
        for end in (".weight", ".bias")
    )
    last = trunk.get("features.norm5.weight")
    inputs = last.numel() if last is not None else None
    if weight is None or bias is None or weight.dim() < 2 or bias.shape != weight.shape[:1]:
        raise CxrdistError(
            f"{where}: the head's weight and bias do not belong together; fetch the file again"
        )
    if inputs is not None and weight.shape[1] != inputs:
        raise CxrdistError(
            f"{where}: the head takes {weight.shape[1]} features, the network gives "
            f"{inputs}; fetch the file again"
        )
    if labels is not None and len(labels) != len(weight):
        raise CxrdistError(
            f"{where}: the head has {len(weight)} outputs, expected {len(labels)} "
            "as in the published layout that its names are of; save other heads as `classifier`"
        )


def shape_of(tensors: dict[str, Tensor], where: str) -> Network:
    """Return the network that the tensors are of, a DenseNet of any shape or another.

    Raises:
        CxrdistError: they are of none that is known here.
    """
    network = _network_of(tensors)
    if network is not None:
        return network
    places = [(_CONV2.fullmatch(name), tensor) for name, tensor in tensors.items()]
    found = [(int(m[1]), int(m[2]), tensor) for m, tensor in places if m and tensor.dim() == 4]
    layers = [
        max((layer for b, layer, _ in found if b == block), default=0) for block in range(1, 5)
    ]
    expected = ", ".join(get_args(Architecture))
    if not all(layers):
        raise CxrdistError(
            f"{where}: the names of its {len(tensors)} tensors are of no network that is known "
            f"here; give weights of {expected}"
        )
    first, second, third, fourth = layers
    growth_rate, block_config = int(found[0][2].shape[0]), (first, second, third, fourth)
    published = [name for name, shape in DENSENETS.items() if shape == (growth_rate, block_config)]
    architecture = cast(Architecture, published[0]) if published else "densenet121"
    try:
        return Network(growth_rate, block_config, architecture=architecture)
    except CxrdistError as error:
        raise CxrdistError(f"{where}: {error}; give weights of {expected}") from None


def check_fit(given: dict[str, Tensor], shape: Network, channels: int, where: str) -> None:
    """Make sure that tensors are exactly those of a network without its head.

    ``num_batches_tracked`` may be missing: files before PyTorch 0.4.1 have none.

    Raises:
        CxrdistError: one is missing, left over, or of another shape.
    """
    own = trunk_of(shape, channels)
    missing = [k for k in own if k not in given and not k.endswith("num_batches_tracked")]
    extra = [k for k in given if k not in own]
    wrong = [k for k in own if k in given and own[k].shape != given[k].shape]
    expected = f"expected those of a {shape.title}{_other(given, shape)}"
    for problem, names in (("the file lacks", missing), ("the network has no place for", extra)):
        if names:
            raise CxrdistError(f"{where}: {problem} {_few(names)}; {expected}")
    if wrong:
        name = wrong[0]
        raise CxrdistError(
            f"{where}: {len(wrong)} tensors have wrong shapes, {name} is "
            f"{list(given[name].shape)}, expected {list(own[name].shape)}; {expected}"
        )


def _other(tensors: dict[str, Tensor], shape: Network) -> str:
    """A note for the error line on the network that tensors are of, if it is another known one."""
    try:
        found = shape_of(tensors, "")
    except CxrdistError:
        return ""
    if found.title == shape.title:
        return ""
    return f", and these are of a {found.title}; give other weights or another network.architecture"


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more
