"""The relevance map as a differentiable function of the weights, for a loss on it."""

import torch
from timm.models.densenet import DenseBlock
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from cxrdist.explain.attribution import STABILISER
from cxrdist.explain.canonise import blocks_of
from cxrdist.model.densenet import Classifier

EPSILON = 0.1
"""Of the linear layer's rule, in units of the logit (composite.py)."""


def relevance(model: Classifier, inputs: Tensor, weights: Tensor) -> Tensor:
    """Relevance of the weighted sum of the logits by the canonical preset.

    The network is taken as it is used: running statistics and no dropout, whatever its mode.

    Args:
        model: with any parameters that require gradients; all others are constants.
        inputs: grey images, float [B, 1, H, W] with values 0..255.
        weights: float [B, classes]; an image starts with weights times logits. A class is a one,
            a contrast a one and a minus one.

    Returns:
        Float [B, H, W], in the dtype of the model.
    """
    with torch.autocast(inputs.device.type, enabled=False):
        return _relevance(model, inputs, weights)


def _relevance(model: Classifier, inputs: Tensor, weights: Tensor) -> Tensor:
    network = model.network
    features = network.features
    images = model.normalise(inputs)
    scale, shift = _affine(features.norm0)
    stem, pool = features.conv0, features.pool0
    first = F.conv2d(images, stem.weight * scale[0, :, None], None, stem.stride, stem.padding)
    first = (first + shift).relu()
    window = pool.kernel_size, pool.stride, pool.padding
    y, places = F.max_pool2d(first, *window, return_indices=True)
    plus, pooled = y, y
    blocks, transitions = blocks_of(network)
    exits = [*(t.norm for t in transitions), features.norm5]
    backs = []
    for number, (block, norm) in enumerate(zip(blocks, exits, strict=True)):
        if number:
            weight = transitions[number - 1].conv.weight
            y, plus = F.conv2d(y, weight), F.conv2d(y, weight.clamp(min=0))
        pool_px = transitions[number].pool.kernel_size if number < len(transitions) else None
        y, back = _block(block, norm, y, plus, pool_px)
        if number:
            backs.append(_entry(weight))
        backs.append(back)
    logits = F.linear(y.flatten(1), network.classifier.weight, network.classifier.bias)
    epsilon = EPSILON * (1 - 2 * (logits < 0).to(logits.dtype))
    ratio = weights * logits / (logits + epsilon)
    g = (ratio @ network.classifier.weight)[:, :, None, None]
    passed = (g, torch.zeros_like(g))
    for back in backs[::-1]:
        passed = back(*passed)
    routed = torch.ops.aten.max_pool2d_with_indices_backward(
        passed[0] * pooled, first, *((side, side) for side in window), (1, 1), False, places
    )
    ones = torch.ones_like(stem.weight[:1, :1])
    z = F.conv2d(torch.ones_like(images[:1, :1]), ones, None, stem.stride, stem.padding)
    ratio = routed.sum(1, keepdim=True) / (z * images.shape[1] + STABILISER)
    size = (len(images), 1, *images.shape[2:])
    shares = torch.nn.grad.conv2d_input(size, ones, ratio, stem.stride[0], stem.padding[0])
    return shares[:, 0] * images.shape[1]


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift [1, C, 1, 1] of a BatchNorm that uses its running statistics."""
    dtype = norm.weight.dtype
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    shift = norm.bias.double() - norm.running_mean.double() * scale
    return scale.to(dtype)[None, :, None, None], shift.to(dtype)[None, :, None, None]


def _consumer(norm: _BatchNorm, y: Tensor, plus: Tensor):
    """Outputs, quotients, |scale| and what is negative."""
    scale, shift = _affine(norm)
    negative = (scale < 0).to(scale.dtype)
    outputs = (y * scale + shift).relu()
    floor = (shift * (1 - 2 * negative)).clamp(min=0) + STABILISER
    z = plus * scale.abs() + floor + negative * outputs
    return outputs, outputs / z, scale.abs(), negative


def _entry(weight: Tensor):
    def back(plus: Tensor, minus: Tensor):
        above = F.conv_transpose2d(plus, weight.clamp(min=0))
        below = F.conv_transpose2d(minus, (-weight).clamp(min=0))
        return above + below, None

    return back


def _block(block: DenseBlock, norm: _BatchNorm, y: Tensor, plus: Tensor, pool_px: int | None):
    seen = []
    for layer in block.children():
        outputs, quotient, factor, negative = _consumer(layer.norm1, y, plus)
        scale, shift = _affine(layer.norm2)
        squeeze = layer.conv1.weight * scale[0, :, None]
        hidden = (F.conv2d(outputs, squeeze) + shift).relu()
        z = F.conv2d(outputs, squeeze.clamp(min=0)) + shift.clamp(min=0) + STABILISER
        weight = layer.conv2.weight
        seen.append((quotient, factor, negative, squeeze, hidden / z, weight, y.shape[1]))
        new = F.conv2d(hidden, weight, None, 1, 1)
        new_plus = F.conv2d(hidden, weight.clamp(min=0), None, 1, 1)
        y, plus = torch.cat([y, new], 1), torch.cat([plus, new_plus], 1)
    outputs, quotient, factor, negative = _consumer(norm, y, plus)
    pooled = F.avg_pool2d(outputs, pool_px or outputs.shape[2:])
    ratio = pooled / (pooled + STABILISER)

    def back(g: Tensor, _: Tensor):
        window = torch.ops.aten.avg_pool2d_backward if pool_px else None
        share = g * ratio
        if window:
            sides = (pool_px, pool_px)
            spread = window(share, outputs, sides, sides, (0, 0), False, True, None)
        else:
            spread = (share / outputs[0, 0].numel()).expand_as(outputs)
        amounts = spread * factor * quotient
        above, below = amounts * (1 - negative), amounts * negative
        for quot, fact, neg, squeeze, hidden, weight, count in seen[::-1]:
            from_above = F.conv_transpose2d(above[:, count:], weight.clamp(min=0), None, 1, 1)
            from_below = F.conv_transpose2d(below[:, count:], (-weight).clamp(min=0), None, 1, 1)
            passed = (from_above + from_below) * hidden
            amounts = F.conv_transpose2d(passed, squeeze.clamp(min=0)) * fact * quot
            above = above[:, :count] + amounts * (1 - neg)
            below = below[:, :count] + amounts * neg
        return above, below

    return pooled, back
