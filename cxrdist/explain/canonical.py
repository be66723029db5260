"""Canonical networks of the architectures with proven rules: the same function, simpler layers.

A canonical network has only convolutions, ReLUs, pools and linear layers, and inputs of all
convolutions except the first are never negative, as the rules of composite.py require. canonise.py
builds it for DenseNets, this file for other networks.

ResNet: each BatchNorm is folded into the convolution before it. The sum of a residual block becomes
part of the block's second convolution, which reads the shortcut beside its own input, so that both
share relevance by their positive contributions to one sum. zennit's ResNetCanonizer instead has a
rule for the sum alone, which divides terms of both signs by a sum that may be almost zero: for a
ResNet18 with random weights, its maps correlate 0.08 to 0.89 with these, and the sum of |relevance|
can be 1.8 times that of relevance (1.0 here).

SqueezeNet: the two branches of a Fire module read the same input, where their relevance is added.
The average over positions is moved before the 1x1 convolution that returns the logits (the two
commute), so that this convolution becomes a linear layer, as in DenseNets.

AlexNet: unchanged.
"""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from timm.models.densenet import DenseNet
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import AlexNet, ResNet, SqueezeNet
from torchvision.models.resnet import BasicBlock
from torchvision.models.squeezenet import Fire

from cxrdist.errors import CxrdistError
from cxrdist.explain.canonise import check_layers, fold_conv, untangle
from cxrdist.explain.description import WITH_RULES


# Tensors made in inference mode cannot be used in autograd, which zennit needs.
@torch.inference_mode(False)
def canonical_network(network: nn.Module) -> nn.Sequential:
    """Build the canonical network, a copy with the same logits.

    Returns:
        A network in evaluation mode on the device and in the dtype of the original, that takes
        normalised images [B, C, H, W] and returns logits [B, classes]. It shares no weights with
        the original, and none of them requires a gradient.

    Raises:
        CxrdistError: the network has no proven rules or an unknown layer, or is in training mode.
    """
    builders = {ResNet: _of_resnet, SqueezeNet: _of_squeezenet, AlexNet: _of_alexnet}
    # Not isinstance: a subclass may compute something else.
    if type(network) is DenseNet:
        return untangle(network)
    if type(network) not in builders:
        raise CxrdistError(
            f"cannot explain a {type(network).__name__}: it has no proven rules of relevance; "
            f"train one of {', '.join(WITH_RULES)} for heat maps"
        )
    check_layers(network)
    return nn.Sequential(*builders[type(network)](network)).eval().requires_grad_(False)


class Fork(nn.Module):
    """Several branches with the same input, whose outputs are concatenated."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Return the channels of all branches [B, out, h, w] for an input [B, in, H, W]."""
        return torch.cat([branch(x) for branch in self.branches], 1)


def _of_alexnet(network: AlexNet) -> list[nn.Module]:
    features, classifier = _copies(network.features), _copies(network.classifier)
    return [*features, deepcopy(network.avgpool), nn.Flatten(), *classifier]


def _of_resnet(network: ResNet) -> list[nn.Module]:
    layers = [fold_conv(network.conv1, [network.bn1]), nn.ReLU(), deepcopy(network.maxpool)]
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        for block in stage:
            layers += _of_block(block)
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), deepcopy(network.fc)]


def _of_block(block: Any) -> list[nn.Module]:
    """Return a block as a fork (first convolution, shortcut) and a convolution of both."""
    if type(block) is not BasicBlock:
        raise CxrdistError(
            f"cannot explain a ResNet of {type(block).__name__}: expected the blocks of ResNet18"
        )
    inner = nn.Sequential(fold_conv(block.conv1, [block.bn1]), nn.ReLU())
    stride = block.conv1.stride[0]
    # A max pool of one pixel subsamples like the strided 1x1 convolution of the shortcut.
    shortcut = nn.MaxPool2d(1, stride) if stride > 1 else nn.Identity()
    joined: Any = fold_conv(block.conv2, [block.bn2])
    if block.downsample is None:
        direct = torch.eye(joined.out_channels).to(joined.weight)[..., None, None]
    else:
        conv, norm = block.downsample
        folded: Any = fold_conv(conv, [norm])
        direct = folded.weight
        joined.bias = nn.Parameter(joined.bias + folded.bias)
    # The shortcut's 1x1 kernel becomes the centre of a 3x3 one.
    joined.weight = nn.Parameter(torch.cat([joined.weight, F.pad(direct, [1] * 4)], 1))
    joined.in_channels = joined.weight.shape[1]
    return [Fork(inner, shortcut), joined, nn.ReLU()]


def _of_squeezenet(network: SqueezeNet) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for module in network.features:
        layers += _of_fire(module) if isinstance(module, Fire) else _copies([module])
    _, conv, between, pool = network.classifier
    if not isinstance(between, nn.Identity):
        raise CxrdistError(
            f"cannot explain a SqueezeNet with a {type(between).__name__} after its logits: "
            "expected none; build it as cxrdist's Classifier does"
        )
    linear = nn.Linear(conv.in_channels, conv.out_channels, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1).clone())
    linear.bias = nn.Parameter(conv.bias.detach().clone())
    return [*layers, deepcopy(pool), nn.Flatten(), linear]


def _of_fire(fire: Fire) -> list[nn.Module]:
    expansions = fire.expand1x1, fire.expand3x3
    branches = (nn.Sequential(deepcopy(conv), nn.ReLU()) for conv in expansions)
    return [deepcopy(fire.squeeze), nn.ReLU(), Fork(*branches)]


def _copies(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Copy layers, with ReLUs that are not in place, and without dropout."""
    kept = [layer for layer in layers if not isinstance(layer, nn.Dropout)]
    return [nn.ReLU() if isinstance(layer, nn.ReLU) else deepcopy(layer) for layer in kept]
