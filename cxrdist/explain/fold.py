"""A DenseNet folded for the engine: weights, their positive and negative parts, and what absorbs.

It is the canonical network (canonise.py) without its copies. A consumer with scale s and shift t
reads a producer's output y as relu(s y + t) = |s| relu(sign(s) y + t / |s|); the factor |s| moves
into the weights behind it. The copy of the producer that it has in the canonical network has the
z-plus |s| (P + max(t, 0) / |s|), where P is conv(h, W+), or conv(h, W-) if s is negative: the same
two convolutions for all consumers.
"""

from typing import NamedTuple

import torch
from timm.models.densenet import DenseBlock, DenseLayer, DenseNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cxrdist.explain.attribution import STABILISER
from cxrdist.explain.canonise import affine, blocks_of, check, fold_conv

LEAST_SCALE = 1e-25
"""A smaller |s| is taken as this: such a channel is constant either way."""


class Consumer(NamedTuple):
    """A BatchNorm that reads C features of N pixels; its results are divided by |s|."""

    sign: Tensor | None
    """[C, 1], 1 or -1; None where all are 1."""
    shift: Tensor
    """[C, 1], t / |s|."""
    floor: Tensor
    """[C, 1], what its z-plus has besides P: bias and stabiliser."""
    absorbed: Tensor
    """[2, C], what bias and stabiliser take of each ratio R / z."""
    scale: Tensor
    """[C, 1], |s|."""

    def read(self, features: Tensor) -> Tensor:
        """Its output behind its ReLU, [C, N]."""
        signed = features if self.sign is None else features * self.sign
        return (signed + self.shift).relu_()

    def denominator(self, plus: Tensor, minus: Tensor | None) -> Tensor:
        """Its z-plus from the producers' two P, [C, N] each."""
        if self.sign is None or minus is None:
            return plus + self.floor
        return torch.where(self.sign > 0, plus, minus) + self.floor


class Layer(NamedTuple):
    """A dense layer: consumer, 1x1 convolution to M hidden channels, ReLU, 3x3 convolution to G."""

    consumer: Consumer
    squeeze: Tensor
    """[C, 2 M], 1x1 weights and their positive part."""
    squeeze_bias: Tensor
    """[2 M], the bias, and what its z-plus has besides."""
    squeeze_back: Tensor
    """[C, M], the positive part."""
    absorbed: Tensor
    """[M, 2], what bias and stabiliser of the 1x1 convolution take of each ratio R / z."""
    grow: Tensor
    """[2 G or 3 G, M, 3, 3], weights and their parts."""
    grow_back: Tensor
    """[M, G or 2 G, 3, 3], the parts, turned round."""
    size: int
    """G."""


class Block(NamedTuple):
    """A dense block, the 1x1 convolution before it, and the BatchNorm and the pool behind it."""

    entry: Tensor | None
    """[2 C or 3 C, in], weights and their parts; None: the first block reads the max pool."""
    entry_back: Tensor | None
    """[in, C or 2 C], the parts."""
    layers: list[Layer]
    exit: Consumer
    size: int
    """C."""
    pool_px: int | None
    """Side of the pool's windows; None: it takes the mean of all pixels."""
    is_mixed: bool
    """Whether some consumer's scale is negative, so that it takes negative parts."""


class Folded(NamedTuple):
    """A whole network."""

    stem: nn.Conv2d
    """The first convolution with its BatchNorm."""
    max_pool: tuple[int, int, int]
    """Window, stride and padding in pixels."""
    blocks: list[Block]
    weight: Tensor
    """[classes, C] of the linear layer."""
    bias: Tensor
    """[classes]."""


def fold(network: DenseNet, biases: bool) -> Folded:
    """Fold a network, which is left as it is.

    Args:
        network: timm's DenseNet in evaluation mode.
        biases: whether biases are part of the denominators and absorb their share.

    Raises:
        CxrdistError: the network is in training mode, or has a layer that is not known here.
    """
    check(network)
    features = network.features
    blocks, transitions = blocks_of(network)
    entries = [None, *(transition.conv for transition in transitions)]
    exits = [*(transition.norm for transition in transitions), features.norm5]
    pools = [*(transition.pool.kernel_size for transition in transitions), None]
    pool, linear = features.pool0, network.classifier
    return Folded(
        fold_conv(features.conv0, [features.norm0]),
        (pool.kernel_size, pool.stride, pool.padding),
        [_block(*parts, biases) for parts in zip(entries, blocks, exits, pools, strict=True)],
        linear.weight.detach().clone(),
        linear.bias.detach().clone(),
    )


def _block(
    entry: nn.Conv2d | None,
    block: DenseBlock,
    exit_norm: _BatchNorm,
    pool_px: int | None,
    biases: bool,
) -> Block:
    dense_layers = list(block.children())
    norms = [*(layer.norm1 for layer in dense_layers), exit_norm]
    is_mixed = any(bool((affine(norm)[0] < 0).any()) for norm in norms)
    with_minus = is_mixed and not biases
    weight = None if entry is None else entry.weight.detach().flatten(1)
    return Block(
        None if weight is None else torch.cat([weight, *_parts(weight, with_minus)]),
        None if weight is None else torch.cat(_parts(weight, is_mixed)).t().contiguous(),
        [_layer(layer, is_mixed, biases) for layer in dense_layers],
        _consumer(exit_norm, biases),
        len(exit_norm.weight) - sum(layer.conv2.out_channels for layer in dense_layers),
        pool_px,
        is_mixed,
    )


def _layer(layer: DenseLayer, is_mixed: bool, biases: bool) -> Layer:
    consumer = _consumer(layer.norm1, biases)
    squeeze = fold_conv(layer.conv1, [layer.norm2])
    weight = squeeze.weight.detach().flatten(1) * consumer.scale.t()
    bias = bias_of(squeeze)
    absorbing = bias.clamp(min=0) * biases
    grow = layer.conv2.weight.detach()
    nhwc = torch.channels_last
    turned = torch.cat(_parts(grow, is_mixed)).flip(2, 3).transpose(0, 1)
    return Layer(
        consumer,
        torch.cat([weight, *_parts(weight, False)]).t().contiguous(),
        torch.cat([bias, absorbing + STABILISER]),
        weight.clamp(min=0).t().contiguous(),
        torch.stack([absorbing, torch.full_like(bias, STABILISER)], 1),
        torch.cat([grow, *_parts(grow, is_mixed and not biases)]).contiguous(memory_format=nhwc),
        turned.contiguous(memory_format=nhwc),
        len(grow),
    )


def _consumer(norm: _BatchNorm, biases: bool) -> Consumer:
    signed, shift = affine(norm)
    scale = signed.abs().clamp(min=LEAST_SCALE)
    absorbing = shift.clamp(min=0) * biases / scale
    stabiliser = STABILISER / scale
    dtype = norm.weight.dtype
    sign = torch.where(signed < 0, -1.0, 1.0)
    return Consumer(
        sign[:, None].to(dtype) if bool((sign < 0).any()) else None,
        (shift / scale)[:, None].to(dtype),
        (absorbing + stabiliser)[:, None].to(dtype),
        torch.stack([absorbing, stabiliser]).to(dtype),
        scale[:, None].to(dtype),
    )


def bias_of(conv: nn.Conv2d) -> Tensor:
    """The bias of a folded convolution, [channels]; it always has one."""
    if conv.bias is None:
        raise RuntimeError("a folded convolution has lost its bias")
    return conv.bias.detach()


def _parts(weight: Tensor, with_minus: bool) -> list[Tensor]:
    """The positive part of weights, and the negative part (as positive numbers) if asked for."""
    parts = [weight.clamp(min=0)]
    return [*parts, (-weight).clamp(min=0)] if with_minus else parts
