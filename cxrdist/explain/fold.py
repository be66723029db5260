"""A DenseNet folded for the engine: weights with their positive and negative parts.

It represents the canonical network of canonise.py, which defines producers and consumers, without
its copies of producers. A consumer with scale s and shift t reads the output y = conv(h, W) of a
producer as relu(s y + t). The z-plus rule divides by the sum of the positive terms alone, which is
called the z-plus. For this consumer it is |s| P + max(t, 0), where P is conv(h, W+) with the
positive part of W, or conv(h, W-) with the absolute negative part if s is negative: the same two
convolutions for all consumers. The second is not needed where the consumer is active:
|s| conv(h, W-) = |s| conv(h, W+) + s y for negative s, so that the z-plus is
|s| conv(h, W+) + output + max(-t, 0).

Everything except the absorbed shares is a differentiable function of the weights; running
statistics are constants.
"""

from typing import Any, NamedTuple

import torch
from timm.models.densenet import DenseBlock, DenseLayer, DenseNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cxrdist.explain.attribution import STABILISER
from cxrdist.explain.canonise import affine, blocks_of

LEAST_SCALE = 1e-25
"""Lower bound of |s|, against division by zero; a channel with a smaller scale is constant."""


class Consumer(NamedTuple):
    """A BatchNorm that reads C features of N pixels."""

    scale: Tensor
    """[C], s."""
    shift: Tensor
    """[C], t."""
    magnitude: Tensor
    """[C], |s|."""
    floor: Tensor
    """[C], bias and stabiliser in its z-plus."""
    absorbed: Tensor
    """[2, C], the factors of |s| R / z that bias and stabiliser absorb."""
    negative: Tensor | None
    """[C, 1], 1 where s is negative, else 0; None if no scale is negative."""

    def read(self, features: Tensor) -> Tensor:
        """Return its output after the ReLU, [C, N]."""
        return scaled(features, self.scale, self.shift).relu_()

    def denominator(self, plus: Tensor, minus: Tensor | None, outputs: Tensor) -> Tensor:
        """Return its z-plus, [C, N]; correct only where it is active.

        Args:
            plus: the producers' P of W+, [C, N].
            minus: their P of W-, which is needed if biases are not in the z-plus.
            outputs: result of `read`.
        """
        if minus is not None and self.negative is not None:
            plus = torch.where(self.negative > 0, minus, plus)
        z = scaled(plus, self.magnitude, self.floor)
        return (
            z if minus is not None or self.negative is None else z.addcmul_(self.negative, outputs)
        )


class Layer(NamedTuple):
    """A dense layer: consumer, 1x1 convolution to M hidden channels, ReLU, 3x3 convolution to G."""

    consumer: Consumer
    squeeze: Tensor
    """[C, 2 M], 1x1 weights and their positive part."""
    squeeze_bias: Tensor
    """[2 M], the bias, and bias and stabiliser in its z-plus."""
    squeeze_back: Tensor
    """[C, M], the positive part times |s|."""
    absorbed: Tensor
    """[M, 2], the factors of R / z that bias and stabiliser of the 1x1 convolution absorb."""
    grow: Tensor
    """[2 G or 3 G, M, 3, 3], weights and their parts."""
    grow_back: Tensor
    """[M, G or 2 G, 3, 3], the parts, flipped for the transposed convolution."""
    size: int
    """G."""


class Block(NamedTuple):
    """A dense block, the 1x1 convolution before it, and the BatchNorm and the pool after it."""

    entry: Tensor | None
    """[2 C or 3 C, in], weights and their parts; None: the first block reads the max pool."""
    entry_back: Tensor | None
    """[in, C or 2 C], the parts."""
    layers: list[Layer]
    exit: Consumer
    size: int
    """C."""
    pool_px: int | None
    """Side of the pool's windows; None for a global pool."""
    with_minus: bool
    """Whether the forward pass computes P of W-."""
    is_mixed: bool
    """Whether some consumer's scale may be negative, so that negative parts are needed."""


class Stem(NamedTuple):
    """The first convolution with its BatchNorm, and the max pool after it."""

    weight: Tensor
    """[C, channels, 7, 7]."""
    bias: Tensor
    """[C]."""
    stride_padding: tuple[int, int]
    """Stride and padding of the convolution in pixels."""
    max_pool: tuple[int, int, int]
    """Window, stride and padding in pixels."""


class Folded(NamedTuple):
    """A whole network."""

    stem: Stem
    blocks: list[Block]
    weight: Tensor
    """[classes, C] of the linear layer."""
    bias: Tensor
    """[classes]."""


def fold(network: DenseNet, biases: bool, *, check_signs: bool = True) -> Folded:
    """Fold a network into new tensors; the network does not change.

    Args:
        network: timm's DenseNet, as Classifier builds it.
        biases: whether biases are part of the denominators and absorb their share.
        check_signs: whether to check which scales are negative, for which the host waits for the
            GPU. If not, any may be, which needs more work.
    """
    features = network.features
    blocks, transitions = blocks_of(network)
    entries = [None, *(transition.conv for transition in transitions)]
    exits = [*(transition.norm for transition in transitions), features.norm5]
    pools = [*(transition.pool.kernel_size for transition in transitions), None]
    return Folded(
        _stem(features),
        [_block(*p, biases, check_signs) for p in zip(entries, blocks, exits, pools, strict=True)],
        network.classifier.weight.clone(),
        network.classifier.bias.clone(),
    )


def _stem(features: Any) -> Stem:
    conv, pool = features.conv0, features.pool0
    weight, bias = _folded(conv.weight, features.norm0)
    window = pool.kernel_size, pool.stride, pool.padding
    return Stem(weight, bias, (conv.stride[0], int(conv.padding[0])), window)


def _folded(weight: Tensor, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return weights [out, ...] and bias [out] of a convolution with the BatchNorm after it."""
    scale, shift = (value.to(weight.dtype) for value in affine(norm))
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), shift


def _block(
    entry: nn.Conv2d | None,
    block: DenseBlock,
    exit_norm: _BatchNorm,
    pool_px: int | None,
    biases: bool,
    check_signs: bool,
) -> Block:
    dense_layers = list(block.children())
    norms = [*(layer.norm1 for layer in dense_layers), exit_norm]
    is_mixed = not check_signs or any(bool((norm.weight < 0).any()) for norm in norms)
    # With biases, the z-plus of negative scales follows from W+ and the output (see the module).
    with_minus = is_mixed and not biases
    weight = None if entry is None else entry.weight.flatten(1)
    return Block(
        None if weight is None else torch.cat([weight, *_parts(weight, with_minus)]),
        None if weight is None else torch.cat(_parts(weight, is_mixed)).t().contiguous(),
        [_layer(layer, is_mixed, biases) for layer in dense_layers],
        _consumer(exit_norm, is_mixed, biases),
        len(exit_norm.weight) - sum(layer.conv2.out_channels for layer in dense_layers),
        pool_px,
        with_minus,
        is_mixed,
    )


def _layer(layer: DenseLayer, is_mixed: bool, biases: bool) -> Layer:
    consumer = _consumer(layer.norm1, is_mixed, biases)
    weight, bias = _folded(layer.conv1.weight.flatten(1), layer.norm2)
    positive = weight.clamp(min=0)
    absorbing = bias.clamp(min=0) * biases
    grow = layer.conv2.weight
    nhwc = torch.channels_last
    turned = torch.cat(_parts(grow, is_mixed)).flip(2, 3).transpose(0, 1)
    return Layer(
        consumer,
        torch.cat([weight, positive]).t().contiguous(),
        torch.cat([bias, absorbing + STABILISER]),
        (positive.t() * consumer.magnitude[:, None]).contiguous(),
        torch.stack([absorbing, torch.full_like(bias, STABILISER)], 1).detach(),
        torch.cat([grow, *_parts(grow, is_mixed and not biases)]).contiguous(memory_format=nhwc),
        turned.contiguous(memory_format=nhwc),
        len(grow),
    )


def _consumer(norm: _BatchNorm, is_mixed: bool, biases: bool) -> Consumer:
    scale, shift = affine(norm)
    magnitude = scale.abs().clamp(min=LEAST_SCALE)
    bias = shift.clamp(min=0) * biases
    # Where the output is part of the z-plus, it already includes the bias.
    floor = torch.where(scale < 0, -shift, shift).clamp(min=0) * biases + STABILISER
    absorbed = torch.stack([bias / magnitude, STABILISER / magnitude])
    dtype = norm.weight.dtype
    negative = (scale < 0)[:, None].to(dtype) if is_mixed else None
    values = (scale, shift, magnitude, floor, absorbed.detach())
    scale, shift, magnitude, floor, absorbed = (value.to(dtype) for value in values)
    return Consumer(scale, shift, magnitude, floor, absorbed, negative)


def scaled(rows: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return scale * rows + shift, [C, N], in one pass over the memory, with BatchNorm's kernel."""
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.batch_norm(
        rows.unsqueeze(0), scale, shift, zero, one, False, 0.0, 0.0, False
    ).squeeze(0)


def scaled_back(gradient: Tensor, rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of `scaled` with respect to rows [C, N], scale and shift [C]."""
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    of_rows, of_scale, of_shift = torch.ops.aten.native_batch_norm_backward(
        *(gradient.unsqueeze(0), rows.unsqueeze(0), scale, zero, one, None, None),
        *(False, 0.0, [True] * 3),
    )
    return of_rows.squeeze(0), of_scale, of_shift


def _parts(weight: Tensor, with_minus: bool) -> list[Tensor]:
    """Return the positive part of weights, and the absolute negative part if requested."""
    parts = [weight.clamp(min=0)]
    return [*parts, (-weight).clamp(min=0)] if with_minus else parts
