"""The supported networks: how each is built, and which modules belong to each of its blocks.

Each is a module of timm or torchvision with the library's own names: its state dict loads strictly
into the library's network, and the other way round.
"""

from collections.abc import Iterator

import timm
import torch
import torchvision
from timm.models.densenet import DenseBlock, DenseNet
from torch import Tensor, nn

from cxrdist.config import Architecture, Network
from cxrdist.errors import CxrdistError
from cxrdist.model.batchnorm import BatchNorm
from cxrdist.model.dropout import Dropout

IMAGENET_URLS: dict[Architecture, str] = {
    "densenet121": torchvision.models.DenseNet121_Weights.IMAGENET1K_V1.url,
    "densenet169": torchvision.models.DenseNet169_Weights.IMAGENET1K_V1.url,
    "densenet201": torchvision.models.DenseNet201_Weights.IMAGENET1K_V1.url,
    "resnet18": torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url,
    "alexnet": torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url,
    "squeezenet1_1": torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url,
    "convnext_atto": timm.get_pretrained_cfg("convnext_atto").url,
}
"""Published weights; each name ends in the first digits of the file's sha256."""


class GrowingBlock(DenseBlock):
    """A dense block whose features grow by one concatenation per layer.

    timm concatenates all earlier features anew in each layer. That moves as many bytes in the
    forward pass, but its backward pass needs a slice and a sum for each pair of layers, a third of
    all operations of a step. This block needs one of each per layer.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Return [B, C + layers * growth rate, H, W] for input features [B, C, H, W]."""
        for layer in self.values():
            squeezed = layer.conv1(layer.norm1(features))
            features = torch.cat([features, layer.conv2(layer.norm2(squeezed))], 1)
        return features


def build_network(shape: Network, num_classes: int, channels: int = 3) -> nn.Module:
    """Build a network with its library's random initial weights, and dropout of `Dropout`.

    Two modules differ from the published networks; neither has entries in the state dict:

    - squeezenet1_1 is built without the ReLU before its average: with it logits would never be
      below 0, and probabilities never below one half.
    - resnet18 gets a dropout before its output layer, like the other networks.

    Only DenseNets and convnext_atto can take other numbers of channels than 3; the others raise
    CxrdistError.
    """
    network = _build(shape, num_classes, channels)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            # The libraries take no class for it.
            module.__class__ = Dropout
    return network


def _build(shape: Network, num_classes: int, channels: int) -> nn.Module:
    name, dropout = shape.architecture, shape.dropout
    if shape.is_densenet:
        return _build_densenet(shape, num_classes, channels)
    if name == "convnext_atto":
        options = {"num_classes": num_classes, "in_chans": channels, "drop_rate": dropout}
        return timm.create_model(name, pretrained=False, **options)
    if channels != 3:
        raise CxrdistError(
            f"architecture: {name} takes images of 3 channels, but the weights have {channels}; "
            "choose weights with 3 channels, or densenet121"
        )
    if name == "resnet18":
        resnet = torchvision.models.resnet18(
            num_classes=num_classes, norm_layer=lambda width: BatchNorm(width, apply_act=False)
        )
        resnet.avgpool = nn.Sequential(resnet.avgpool, nn.Dropout(dropout))
        return resnet
    if name == "alexnet":
        return torchvision.models.alexnet(num_classes=num_classes, dropout=dropout)
    squeezenet = torchvision.models.squeezenet1_1(num_classes=num_classes, dropout=dropout)
    squeezenet.classifier[2] = nn.Identity()
    return squeezenet


def _build_densenet(shape: Network, num_classes: int, channels: int) -> DenseNet:
    """Build timm's DenseNet, which has torchvision's names."""
    growth_rate, block_config = shape.dense_shape
    network = DenseNet(
        growth_rate=growth_rate,
        block_config=block_config,
        num_classes=num_classes,
        in_chans=channels,
        drop_rate=shape.dropout,
        # A function, because timm puts its own BatchNormAct2d in place of a class named BatchNorm.
        norm_layer=lambda *sizes, **options: BatchNorm(*sizes, **options),
    )
    for module in network.features.children():
        if isinstance(module, DenseBlock):
            # timm's DenseNet takes no class for its blocks. The names in the state dict stay.
            module.__class__ = GrowingBlock
    return network


def parts_of(shape: Network) -> dict[str, tuple[str, ...]]:
    """Return the modules of each block by block name, in forward order.

    ============= ==================================== ===================================
    architecture  blocks between stem and head         which are
    ============= ==================================== ===================================
    densenet*     denseblock1 to denseblock4           features.denseblock1 to 4
    resnet18      layer1 to layer4                     layer1 to layer4
    alexnet       conv2 to conv5, fc6, fc7             features.3, 6, 8, 10, classifier.1, 4
    squeezenet1_1 fire2 to fire9                       features.3, 4, 6, 7, 9 to 12
    convnext_atto stages0 to stages3                   stages.0 to stages.3
    ============= ==================================== ===================================

    The stem is everything before these blocks. The head is the output layer with its dropout.
    Modules between two blocks belong to the earlier one, and so does a norm before the head.
    The blocks of alexnet (Krizhevsky et al. 2012) and squeezenet are numbered as in their papers.
    """
    name, middle = shape.architecture, dict[str, tuple[str, ...]]()
    if name == "resnet18":
        middle = {f"layer{i}": (f"layer{i}",) for i in range(1, 5)}
        return {"stem": ("conv1", "bn1"), **middle, "head": ("avgpool", "fc")}
    if name == "alexnet":
        convolutions = zip((2, 3, 4, 5), (3, 6, 8, 10), strict=True)
        middle = {f"conv{number}": (f"features.{index}",) for number, index in convolutions}
        middle |= {"fc6": ("classifier.0", "classifier.1"), "fc7": ("classifier.3", "classifier.4")}
        return {"stem": ("features.0",), **middle, "head": ("classifier.6",)}
    if name == "squeezenet1_1":
        fires = zip(range(2, 10), (3, 4, 6, 7, 9, 10, 11, 12), strict=True)
        middle = {f"fire{number}": (f"features.{index}",) for number, index in fires}
        return {"stem": ("features.0",), **middle, "head": ("classifier",)}
    if name == "convnext_atto":
        middle = {f"stages{i}": (f"stages.{i}",) for i in range(3)}
        middle["stages3"] = ("stages.3", "head.norm")
        return {"stem": ("stem",), **middle, "head": ("head.drop", "head.fc")}
    num_blocks = len(shape.dense_shape[1])
    middle = {
        f"denseblock{i}": (f"features.denseblock{i}", f"features.transition{i}")
        for i in range(1, num_blocks)
    }
    middle[f"denseblock{num_blocks}"] = (f"features.denseblock{num_blocks}", "features.norm5")
    stem = ("features.conv0", "features.norm0")
    return {"stem": stem, **middle, "head": ("head_drop", "classifier")}


def block_names(shape: Network) -> list[str]:
    """Return the names of all blocks in forward order, from stem to head."""
    return list(parts_of(shape))


def block_of(name: str, shape: Network) -> str:
    """Return the block of a parameter, buffer or module; raise ValueError for other names."""
    for block, prefixes in parts_of(shape).items():
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
            return block
    raise ValueError(f"{name} is in no block of {shape.architecture}")


def modules_of(network: nn.Module, shape: Network, blocks: set[str]) -> Iterator[nn.Module]:
    """Yield the modules of the given blocks."""
    for block, names in parts_of(shape).items():
        if block in blocks:
            yield from (network.get_submodule(name) for name in names)


def output_layer(shape: Network) -> str:
    """Return the name of the output layer, the only layer of the head with weights."""
    if shape.architecture == "squeezenet1_1":
        return "classifier.1"
    return parts_of(shape)["head"][-1]


def smallest_size_px(shape: Network) -> int:
    """Return the side of the smallest square that leaves at least one pixel in every layer."""
    # tests/model/test_networks.py also tries a square of one pixel less.
    sizes = {"alexnet": 63, "squeezenet1_1": 17, "convnext_atto": 32, "resnet18": 1}
    return 29 if shape.is_densenet else sizes[shape.architecture]


def refuse_small_squares(shape: Network, size_px: int, where: str) -> None:
    """Raise CxrdistError if squares, from an option or field `where`, are too small."""
    smallest = smallest_size_px(shape)
    if size_px < smallest:
        raise CxrdistError(
            f"{where}: squares of {size_px} px, but {shape.title} needs at least {smallest} px; "
            f"pack with --size {smallest} or more, or choose another network.architecture"
        )


def norms_of_one_value(shape: Network, channels: int, size_px: int) -> set[str]:
    """Return blocks with a BatchNorm on features of 1 x 1 px; runs on shapes, without values."""
    blocks = set[str]()

    def check(name: str, features: Tensor) -> None:
        if features.shape[2:].numel() == 1:
            blocks.add(block_of(name, shape))

    with torch.device("meta"), torch.no_grad():
        network = build_network(shape, 1, channels).eval()
        for name, norm in network.named_modules():
            if isinstance(norm, BatchNorm):
                norm.register_forward_pre_hook(lambda _, inputs, name=name: check(name, inputs[0]))
        network(torch.empty(1, channels, size_px, size_px))
    return blocks
