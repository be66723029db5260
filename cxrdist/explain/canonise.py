"""The canonical network of a DenseNet: convolutions, ReLUs, pools and a linear layer only.

LRP's rules are defined for a linear layer followed by ReLU. A DenseNet has the opposite order
(BatchNorm, ReLU, convolution), and many BatchNorms read the same convolution. Rules applied to it
directly give a map that conserves relevance but is wrong. Here every BatchNorm is folded into the
convolution before it, with one copy of that convolution for each BatchNorm that reads it.

Words: a producer is a convolution whose output is concatenated (a block's entry or a conv2), a
consumer is a BatchNorm that reads the concatenation (a later norm1, the transition's norm, norm5).
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from timm.models.densenet import DenseBlock, DenseNet, DenseTransition
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cxrdist.errors import CxrdistError

_KNOWN_LAYERS = (
    nn.Conv2d,
    _BatchNorm,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
    nn.Dropout,
    nn.Linear,
    nn.Identity,
)


def untangle(network: DenseNet) -> nn.Sequential:
    """Build the canonical network of a DenseNet, as canonical.py describes it.

    A transition pools before its 1x1 convolution (the two commute): after it the pool's rule would
    divide signed sums by almost zero. DenseNet121 becomes 36 million weights, 146 MB in float32.

    Raises:
        CxrdistError: the network is in training mode, or has an unknown layer.
    """
    check(network)
    features = network.features
    blocks, transitions = blocks_of(network)
    entry = _identity_like(features.conv0)
    pool = features.pool0
    layers: list[nn.Module] = [
        fold_conv(features.conv0, [features.norm0]),
        nn.ReLU(),
        nn.MaxPool2d(pool.kernel_size, pool.stride, pool.padding),
    ]
    for block, transition in zip(blocks, transitions, strict=False):
        pool = transition.pool
        layers.append(_untangle_block(entry, block, transition.norm))
        layers.append(nn.AvgPool2d(pool.kernel_size, pool.stride))
        entry = transition.conv
    layers += [_untangle_block(entry, blocks[-1], features.norm5), nn.AdaptiveAvgPool2d(1)]
    layers += [nn.Flatten(), deepcopy(network.classifier)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def blocks_of(network: DenseNet) -> tuple[list[DenseBlock], list[DenseTransition]]:
    """Return the dense blocks of a network, and the transitions, one after each but the last."""
    children = list(network.features.named_children())
    blocks = [child for name, child in children if name.startswith("denseblock")]
    return blocks, [child for name, child in children if name.startswith("transition")]


class Producer(nn.Module):
    """A producer with one output per consumer, after the consumer's BatchNorm and ReLU."""

    def __init__(self, conv: nn.Conv2d, num_consumers: int) -> None:
        super().__init__()
        self.conv = conv
        self.relu = nn.ReLU()
        self.num_consumers = num_consumers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return one tensor [B, out, H, W] per consumer, in order, for an input [B, in, H, W]."""
        copies = self.relu(self.conv(x))
        return copies.unflatten(1, (-1, self.num_consumers)).unbind(2)


class Block(nn.Module):
    """A dense block from its entry to the input of what follows it.

    ``layers`` are Sequential(conv1, ReLU, Producer). The consumers are the layers and, as the last
    one, what follows the block; each takes the next copy of every producer that precedes it.
    """

    def __init__(self, entry: Producer, layers: list[nn.Sequential]) -> None:
        super().__init__()
        self.entry = entry
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last consumer's input [B, out, H, W] for an input [B, in, H, W]."""
        copies = [iter(self.entry(x))]
        for layer in self.layers:
            copies.append(iter(layer(torch.cat([next(copy) for copy in copies], 1))))
        return torch.cat([next(copy) for copy in copies], 1)


def _untangle_block(entry: nn.Conv2d, block: DenseBlock, exit_norm: _BatchNorm) -> Block:
    """Fold a dense block; ``exit_norm`` is the BatchNorm that reads its whole output."""
    dense_layers = list(block.children())
    consumers = [*(layer.norm1 for layer in dense_layers), exit_norm]
    producers = []
    start = 0
    for index, conv in enumerate([entry, *(layer.conv2 for layer in dense_layers)]):
        readers = consumers[index:]
        producers.append(Producer(fold_conv(conv, readers, start), len(readers)))
        start += conv.out_channels
    layers = [
        nn.Sequential(fold_conv(layer.conv1, [layer.norm2]), nn.ReLU(), producer)
        for layer, producer in zip(dense_layers, producers[1:], strict=True)
    ]
    return Block(producers[0], layers)


def fold_conv(conv: nn.Conv2d, norms: Sequence[_BatchNorm], start: int = 0) -> nn.Conv2d:
    """Return one convolution that computes another, and after it each of several BatchNorms.

    Its channel ``c * len(norms) + n`` is channel c of ``conv``, a square one without bias, after
    norm n. ``start`` is the position of ``conv``'s first channel in the input of the norms.
    """
    channels = slice(start, start + conv.out_channels)
    affines = [affine(norm) for norm in norms]
    scale = torch.stack([scale[channels] for scale, _ in affines], 1)
    shift = torch.stack([shift[channels] for _, shift in affines], 1)
    weight = conv.weight.double().unsqueeze(1) * scale[..., None, None, None]
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels * len(norms),
        conv.kernel_size[0],
        conv.stride[0],
        int(conv.padding[0]),
        groups=conv.groups,
        device="meta",  # its tensors are replaced below
    )
    # The copies of a channel are neighbours, as a grouped convolution needs them.
    folded.weight = nn.Parameter(weight.detach().flatten(0, 1).to(conv.weight.dtype))
    folded.bias = nn.Parameter(shift.detach().flatten().to(conv.weight.dtype))
    return folded


def affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return scale and shift, float64 [channels], of a BatchNorm with running statistics."""
    if norm.running_mean is None or norm.running_var is None:
        raise CxrdistError(
            "cannot explain a network whose BatchNorm keeps no running statistics; "
            "build it as cxrdist's Classifier does"
        )
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _identity_like(conv: nn.Conv2d) -> nn.Conv2d:
    """Return a 1x1 convolution that copies each channel of ``conv``, as entry of block 1."""
    channels = conv.out_channels
    identity = nn.Conv2d(channels, channels, 1, groups=channels, bias=False, device="meta")
    identity.weight = nn.Parameter(conv.weight.new_ones(channels, 1, 1, 1))
    return identity


def check(network: nn.Module) -> None:
    """Raise CxrdistError unless a network is a DenseNet that can be explained."""
    if type(network) is not DenseNet:
        raise CxrdistError(
            f"cannot explain a {type(network).__name__}: expected timm's DenseNet; "
            "pass the network of a Classifier"
        )
    check_layers(network)
    if hasattr(network.features, "conv1"):
        raise CxrdistError(
            "cannot explain a DenseNet with a deep stem: expected one 7x7 convolution; "
            "build it as cxrdist's Classifier does"
        )


def check_layers(network: nn.Module) -> None:
    """Raise CxrdistError unless a network is in evaluation mode, and all its layers have rules."""
    if any(module.training for module in network.modules()):
        raise CxrdistError(
            "cannot explain a network in training mode: its BatchNorms must use their running "
            "statistics; call model.eval() first"
        )
    for name, module in network.named_modules():
        is_leaf = not any(module.children())
        if is_leaf and not isinstance(module, _KNOWN_LAYERS):
            raise CxrdistError(
                f"cannot explain layer {name} ({type(module).__name__}): expected BatchNorm, ReLU, "
                "convolutions, average and max pools and linear layers; build the network as "
                "cxrdist's Classifier does"
            )
