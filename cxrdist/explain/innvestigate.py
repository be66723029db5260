"""The paper's own program: LRP-PresetA of iNNvestigate 1.0.8.3 on the unchanged DenseNet.

It applies the rules of the canonical preset (composite.py) without the canonical network. A
BatchNorm with input x and output y passes on R x (y - beta) / ((x - mu) y). A transition's pool
follows its convolution and divides by sums of both signs. Neither conserves relevance: the ledger
shows what they lose or add, which can be many times the logit. These maps are for comparison with
published ones, not for interpretation.

iNNvestigate skips the flat rule after a layer of zero padding, and conversions of DenseNet121 to
Keras have such a layer: the paper's maps were most likely made without it (``flat=False``).
"""

from collections.abc import Callable
from copy import deepcopy
from typing import cast

import torch
from timm.models.densenet import DenseBlock, DenseLayer, DenseNet
from torch import Tensor, nn
from torch.func import vjp
from torch.nn.modules.batchnorm import _BatchNorm

from cxrdist.explain.attribution import Attribution, Ledger, concatenate, sum_per_image
from cxrdist.explain.canonise import affine, blocks_of, check

KERAS_EPSILON = 1e-7
"""iNNvestigate adds this to denominators that are zero; for a BatchNorm to all, with their sign."""


class Innvestigate:
    """Explains a DenseNet as iNNvestigate 1.0.8.3 does; keeps a copy of the network."""

    def __init__(self, network: DenseNet, flat: bool, epsilon: float) -> None:
        """Copy the network.

        The rule of the first convolution is flat or alpha1-beta0; epsilon is the linear layer's.
        """
        check(network)
        self._network = deepcopy(network).requires_grad_(False)
        self._flat, self._epsilon = flat, epsilon

    @torch.no_grad()
    def attribute(self, inputs: Tensor, targets: list[int]) -> Attribution:
        """Return the relevance of normalised images [B, C, H, W] for classes given by number."""
        network = self._network
        features = network.features
        blocks, transitions = blocks_of(network)
        stem = _flat(features.conv0) if self._flat else _alpha1_beta0(features.conv0)
        steps = [stem, _norm(features.norm0), _gradient(features.pool0), _block(blocks[0])]
        for transition, block in zip(transitions, blocks[1:], strict=True):
            conv, pool = _alpha1_beta0(transition.conv), _average(transition.pool)
            steps += [_norm(transition.norm), conv, pool, _block(block)]
        steps += [_norm(features.norm5), _average(nn.AdaptiveAvgPool2d(1))]
        steps += [_gradient(nn.Flatten())]
        pooled, back = _chain(steps)(inputs)
        logits, ledger = network.classifier(pooled), Ledger()
        attributions = []
        for target in targets:
            logit = logits[:, target]
            ledger.open(logit)
            relevance = back(self._head(pooled, logit, target, ledger), ledger)
            attributions.append(ledger.close(logit, relevance))
        return concatenate(attributions)

    def _head(self, pooled: Tensor, logit: Tensor, target: int, ledger: Ledger) -> Tensor:
        """Return the relevance of the pooled features [B, C], by the epsilon rule."""
        linear = self._network.classifier
        stabiliser = self._epsilon * (1 - 2 * (logit < 0).to(logit.dtype))
        ratio = logit / (logit + stabiliser)
        ledger.bias += ratio * linear.bias[target]
        ledger.epsilon += ratio * stabiliser
        return pooled * linear.weight[target] * ratio[:, None]


Layer = Callable[[Tensor], Tensor]
Back = Callable[[Tensor, Ledger], Tensor]
"""Returns the relevance of a step's input, given that of its output."""
Step = Callable[[Tensor], tuple[Tensor, Back]]
"""Returns the output of a part of the network for an input, and the way back."""


def _chain(steps: list[Step]) -> Step:
    def step(x: Tensor) -> tuple[Tensor, Back]:
        backs: list[Back] = []
        for each in steps:
            x, back = each(x)
            backs.append(back)

        def back_through(relevance: Tensor, ledger: Ledger) -> Tensor:
            for back in reversed(backs):
                relevance = back(relevance, ledger)
            return relevance

        return x, back_through

    return step


def _block(block: DenseBlock) -> Step:
    """Return a dense block: each layer takes the concatenation of all outputs before it."""
    return _chain([_beside_itself(layer) for layer in block.children()])


def _beside_itself(layer: DenseLayer) -> Step:
    """Return a dense layer, its output appended to its input; relevance of both uses adds up."""
    convs = _alpha1_beta0(layer.conv1), _alpha1_beta0(layer.conv2)
    inner = _chain([_norm(layer.norm1), convs[0], _norm(layer.norm2), convs[1]])

    def step(x: Tensor) -> tuple[Tensor, Back]:
        new, back = inner(x)
        count = x.shape[1]

        def back_to_both(relevance: Tensor, ledger: Ledger) -> Tensor:
            return relevance[:, :count] + back(relevance[:, count:], ledger)

        return torch.cat([x, new], 1), back_to_both

    return step


def _norm(norm: _BatchNorm) -> Step:
    """Return a BatchNorm, whose rule does not conserve, and its ReLU, which passes everything."""
    scale, shift = (value.to(norm.weight.dtype)[:, None, None] for value in affine(norm))
    beta, mean = norm.bias[:, None, None], cast(Tensor, norm.running_mean)[:, None, None]

    def step(x: Tensor) -> tuple[Tensor, Back]:
        y = x * scale + shift

        def back(relevance: Tensor, ledger: Ledger) -> Tensor:
            divisor = (x - mean) * y
            divisor = divisor + KERAS_EPSILON * (2 * (divisor >= 0).to(x.dtype) - 1)
            passed = relevance * x * (y - beta) / divisor
            ledger.bias += sum_per_image(relevance - passed)  # a BatchNorm absorbs like a bias
            return passed

        return y.relu(), back

    return step


def _alpha1_beta0(conv: nn.Conv2d) -> Step:
    """Return the z-plus rule for inputs of both signs: the parts x+ w+ and x- w-."""
    positive = _like(conv, conv.weight.clamp(min=0))
    negative = _like(conv, conv.weight.clamp(max=0))
    return _proportional(conv, lambda x: [(positive, x.clamp(min=0)), (negative, x.clamp(max=0))])


def _flat(conv: nn.Conv2d) -> Step:
    """Return the flat rule: all pixels of a window receive the same relevance."""
    ones = _like(conv, torch.ones_like(conv.weight))
    return _proportional(conv, lambda x: [(ones, torch.ones_like(x))])


def _average(pool: Layer) -> Step:
    """Return an average pool: each input receives its share of the sum, whatever the signs."""
    return _proportional(pool, lambda x: [(pool, x)])


def _proportional(layer: Layer, terms: Callable[[Tensor], list[tuple[Layer, Tensor]]]) -> Step:
    """Return a layer whose inputs receive relevance in proportion to their terms of a sum z.

    The sum is that of linear layers, each with its own function of the layer's input.
    """

    def step(x: Tensor) -> tuple[Tensor, Back]:
        def back(relevance: Tensor, ledger: Ledger) -> Tensor:
            parts = [(values, *_linear(linear, values)) for linear, values in terms(x)]
            zero = x.new_zeros(())
            ratio = _ratio(relevance, sum((z for _, z, _ in parts), zero), ledger)
            return sum((values * pull(ratio) for values, _, pull in parts), zero)

        return layer(x), back

    return step


def _gradient(layer: Layer) -> Step:
    """Return a layer with the gradient as its rule: a max pool, or a change of shape."""

    def step(x: Tensor) -> tuple[Tensor, Back]:
        y, pull = _linear(layer, x)
        return y, lambda relevance, ledger: pull(relevance)

    return step


def _ratio(relevance: Tensor, z: Tensor, ledger: Ledger) -> Tensor:
    """Return relevance / z; relevance where z is 0 is lost, and booked as epsilon."""
    is_zero = (z == 0).to(z.dtype)
    ratio = relevance / (z + is_zero * KERAS_EPSILON)
    ledger.epsilon += sum_per_image(ratio * is_zero * KERAS_EPSILON)
    return ratio


def _linear(layer: Layer, x: Tensor) -> tuple[Tensor, Layer]:
    """Return the output of a layer, and its transpose where it is linear around the input."""
    y, pull = cast(tuple[Tensor, Callable[[Tensor], tuple[Tensor]]], vjp(layer, x))
    return y, lambda ratio: pull(ratio)[0]


def _like(conv: nn.Conv2d, weight: Tensor) -> Layer:
    """Return the convolution with other weights and no bias."""
    return lambda x: nn.functional.conv2d(x, weight, None, conv.stride, conv.padding)
