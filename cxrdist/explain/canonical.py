"""The canonical network of each architecture that has proven rules: equal to it, and simpler.

Nothing is left but convolutions, ReLUs, pools and linear layers, and each convolution but the first
reads what is never negative: that is what the rules of composite.py are made for. canonise.py does
it for DenseNets, this file for the others:

    ResNet      each BatchNorm is folded into the convolution before it. The sum of a residual block
                becomes part of its second convolution, which reads the shortcut beside its own
                input. Both then share relevance by their positive contributions to one sum. A rule
                for the bare sum would divide terms of both signs by a sum that may be almost zero.
    SqueezeNet  the two ways of a Fire module read one input; relevance of both uses adds up.
    AlexNet     as it is, without dropout.
"""

from collections.abc import Iterable
from copy import deepcopy

import torch
from timm.models.densenet import DenseNet
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import AlexNet, ResNet, SqueezeNet
from torchvision.models.resnet import BasicBlock
from torchvision.models.squeezenet import Fire

from cxrdist.errors import CxrdistError
from cxrdist.explain.canonise import check_layers, fold_conv, untangle


@torch.inference_mode(False)
def canonical_network(network: nn.Module) -> nn.Sequential:
    """Build the canonical network, which gives the same logits; the original is left as it is.

    Args:
        network: of a Classifier, in evaluation mode.

    Returns:
        A network in evaluation mode on the device and in the dtype of the original, that takes
        normalised images [B, C, H, W] and gives logits [B, classes]. It shares no weights with the
        original, and none of them requires a gradient.

    Raises:
        CxrdistError: the network is in training mode, or of no kind that has proven rules.
    """
    if type(network) is DenseNet:
        return untangle(network)
    check_layers(network)
    if type(network) is ResNet:
        layers = _of_resnet(network)
    elif type(network) is SqueezeNet:
        layers = _of_squeezenet(network)
    elif type(network) is AlexNet:
        layers = [*_copies(network.features), deepcopy(network.avgpool), nn.Flatten()]
        layers += _copies(network.classifier)
    else:
        raise CxrdistError(f"cannot explain a {type(network).__name__}: it has no proven rules")
    return nn.Sequential(*layers).eval().requires_grad_(False)


class Classifying(nn.Conv2d):
    """The 1x1 convolution that gives the logits of each place: it takes the linear layer's rule."""


class Fork(nn.Module):
    """Several ways from one input, whose outputs are concatenated."""

    def __init__(self, *ways: nn.Module) -> None:
        super().__init__()
        self.ways = nn.ModuleList(ways)

    def forward(self, x: Tensor) -> Tensor:
        """From [B, in, H, W] to the channels of all ways, [B, out, h, w]."""
        return torch.cat([way(x) for way in self.ways], 1)


def _of_resnet(network: ResNet) -> list[nn.Module]:
    layers = [fold_conv(network.conv1, [network.bn1]), nn.ReLU(), deepcopy(network.maxpool)]
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        for block in stage:
            layers += _of_basic_block(block)
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), deepcopy(network.fc)]


def _of_basic_block(block: BasicBlock) -> list[nn.Module]:
    """Its first convolution beside its input; and both its second one and the sum."""
    inner = nn.Sequential(fold_conv(block.conv1, [block.bn1]), nn.ReLU())
    step = block.conv1.stride[0]
    # A window of one pixel takes every other pixel, as the shortcut's convolution does.
    shortcut = nn.MaxPool2d(1, step) if step > 1 else nn.Identity()
    joined = fold_conv(block.conv2, [block.bn2])
    if block.downsample is None:
        direct = torch.eye(joined.out_channels).to(joined.weight)[..., None, None]
    else:
        conv, norm = block.downsample
        folded = fold_conv(conv, [norm])
        direct = folded.weight
        joined.bias = nn.Parameter(joined.bias + folded.bias)
    joined.weight = nn.Parameter(torch.cat([joined.weight, F.pad(direct, [1] * 4)], 1))
    joined.in_channels = joined.weight.shape[1]
    return [Fork(inner, shortcut), joined, nn.ReLU()]


def _of_squeezenet(network: SqueezeNet) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for module in network.features:
        layers += _of_fire(module) if isinstance(module, Fire) else _copies([module])
    classifying, *others = _copies(network.classifier)
    classifying.__class__ = Classifying
    return [*layers, classifying, *others, nn.Flatten()]


def _of_fire(fire: Fire) -> list[nn.Module]:
    ways = (nn.Sequential(deepcopy(conv), nn.ReLU()) for conv in (fire.expand1x1, fire.expand3x3))
    return [deepcopy(fire.squeeze), nn.ReLU(), Fork(*ways)]


def _copies(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Copy layers; ReLUs leave their inputs as they are, and dropout, which does nothing, goes."""
    kept = [layer for layer in layers if not isinstance(layer, nn.Dropout)]
    return [nn.ReLU() if isinstance(layer, nn.ReLU) else deepcopy(layer) for layer in kept]
