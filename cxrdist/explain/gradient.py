"""The relevance map as a differentiable function of the weights, for a loss on it.

The map is computed by the forward and backward pass of engine.py. Its gradient goes through both in
reverse order: first up from the pixels to the logits through the backward pass (functions named
climb), which is linear in the relevance, then down from the logits through the forward pass (named
descend). Like the engine, this keeps all features of a block in one array without a copy for each
consumer. ``of_X`` is the gradient with respect to X, ``less_of_X`` its negative.

A rule passes on A = g a / z. If v is the gradient with respect to A, those with respect to a and z
are v A / a and - v A / z, so the product v A is kept for both. Where a is 0, its ReLU blocks the
gradient.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from cxrdist.explain.attribution import STABILISER, Rules
from cxrdist.explain.engine import (
    Features,
    Passing,
    Seen,
    SeenBlock,
    Watcher,
    as_images,
    backward_max_pool,
    backward_pass,
    forward_pass,
    head_quotients,
    pool_quotients,
    unpool,
    window_sizes,
)
from cxrdist.explain.fold import Block, Consumer, Folded, Layer, Stem, fold, scaled_back
from cxrdist.model.densenet import Classifier

# The gradient below is only for these: the flat rule, and biases in the denominators.
_RULES = Rules()


def relevance(model: Classifier, inputs: Tensor, weights: Tensor) -> Tensor:
    """Return the relevance of a weighted sum of the logits by the canonical preset.

    The network is evaluated with running statistics and without dropout, whatever its mode. The
    result can be differentiated once, with respect to the parameters. torch.compile cannot trace
    it: call it outside compiled functions.

    Args:
        model: parameters that require gradients get them; all others are constants.
        inputs: grey images, float [B, 1, H, W] with values 0..255.
        weights: float [B, classes], constants; factors of the logits. A single 1 gives the map of a
            class, 1 and -1 that of a contrast.

    Returns:
        Float [B, H, W], in the dtype of the model.
    """
    with torch.autocast(inputs.device.type, enabled=False):
        folded = fold(model.network, _RULES.biases, check_signs=inputs.device.type == "cpu")
        # Flat, because autograd follows a Function's arguments, but not tensors within them.
        leaves, structure = tree_flatten(folded)
        images = model.normalise(inputs).detach()
        result: Tensor = _Map.apply(images, weights.detach().to(images.dtype), structure, *leaves)
        return result


class _Map(torch.autograd.Function):
    """The relevance map of a folded network, and its gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weights: Tensor, structure: Any, *leaves: Any) -> Tensor:
        """Return the relevance [B, H, W] of normalised images [B, C, H, W]."""
        folded: Folded = tree_unflatten(leaves, structure)
        seen = forward_pass(folded, inputs)
        trace = _Trace([], [], [], [])
        relevance = backward_pass(folded, _RULES, seen, weights.unsqueeze(0), trace)
        ctx.kept = folded, structure, weights, seen, trace
        return relevance.squeeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to the leaves of the folded network."""
        if ctx.kept is None:
            raise RuntimeError("the map can be differentiated only once: its buffers are reused")
        (folded, structure, weights, seen, trace), ctx.kept = ctx.kept, None
        needed = ctx.needs_input_grad[3:]
        lowest = _lowest(tree_unflatten(needed, structure))
        with torch.autocast(gradient.device.type, enabled=False):
            of_folded = _gradient(folded, weights, seen, trace, gradient.contiguous(), lowest)
        gradients = tree_flatten(of_folded)[0]
        pairs = zip(gradients, needed, strict=True)
        of_leaves = (leaf if is_needed else None for leaf, is_needed in pairs)
        return None, None, None, *of_leaves


def _lowest(needed: Folded) -> int:
    """Return the number of the first block that needs a gradient; -1 if the stem does."""
    for number, block in enumerate([needed.stem, *needed.blocks], -1):
        if any(tree_flatten(block)[0]):
            return number
    return len(needed.blocks)


@dataclass(frozen=True)
class _Trace(Watcher):
    """The intermediate values of the backward pass, in its order."""

    amounts: list[Tensor]
    """Values from each consumer to its producers, [C, N]."""
    ratios: list[Tensor]
    """R / z of each 1x1 convolution, [N, M]."""
    passing: list[Passing]
    """Sums of these values for the producers of each block."""
    passed: list[Tensor]
    """g of the pooled outputs of each block, [C, B, h, w]."""

    def see_amounts(self, consumer: Consumer, amounts: Tensor) -> None:
        self.amounts.append(amounts.flatten(1))

    def see_ratio(self, layer: Layer, ratio: Tensor) -> None:
        self.ratios.append(ratio.squeeze(0))

    def see_block(self, passed: Tensor, passing: Passing) -> None:
        self.passed.append(passed.squeeze(1))
        self.passing.append(passing)


def _gradient(
    folded: Folded, weights: Tensor, seen: Seen, trace: _Trace, gradient: Tensor, lowest: int
) -> Folded:
    """Return gradients with respect to a folded network, from the gradient of the map [B, H, W].

    Blocks below the lowest are frozen: for them, and for other constants, the values themselves are
    returned as placeholders.
    """
    of_routed = _climb_stem(folded.stem, seen, gradient)
    v = (of_routed * seen.features).flatten(1)
    passed = trace.passing[-1].take(0, len(of_routed))[0]
    of_inputs = (of_routed * passed.reshape(of_routed.shape)).flatten(1)
    climbed = []
    for block, seen_block in zip(folded.blocks, seen.blocks, strict=True):
        climbed.append(_climb_block(block, seen_block, trace, v))
        v = climbed[-1].of_passed.flatten(1)
    of_weight, of_bias, of_pooled = _head(folded, weights, seen, v)
    of_blocks = list(folded.blocks)
    for number in range(len(of_blocks) - 1, max(lowest, 0) - 1, -1):
        block_values = folded.blocks[number], seen.blocks[number], climbed.pop()
        of_blocks[number], of_pooled = _descend_block(*block_values, of_pooled)
    of_stem = folded.stem
    if lowest < 0:
        of_stem = _descend_stem(folded.stem, seen, (of_inputs + of_pooled).reshape(of_routed.shape))
    return Folded(of_stem, of_blocks, of_weight, of_bias)


def _climb_stem(stem: Stem, seen: Seen, gradient: Tensor) -> Tensor:
    """Return the gradient of g at the max pool's output [C, B, h, w], from that of the map."""
    ones = torch.ones_like(stem.weight[:1, :1])
    spread = (
        F.conv2d(gradient.unsqueeze(1), ones, None, *stem.stride_padding) * seen.inputs.shape[1]
    )
    of_first = (spread / (window_sizes(stem, seen.inputs) + STABILISER)).flatten(2)
    num_channels = len(stem.weight)
    picked = of_first.expand(-1, num_channels, -1).gather(2, seen.max_indices.flatten(2))
    return picked.reshape(seen.max_indices.shape).transpose(0, 1).contiguous()


def _descend_stem(stem: Stem, seen: Seen, of_features: Tensor) -> Stem:
    """Return the gradients of the first convolution, from that of the max pool's output."""
    of_first = backward_max_pool(stem, seen, of_features.transpose(0, 1).contiguous())
    of_sums = torch.ops.aten.threshold_backward(of_first, seen.first, 0)
    stride, padding = ([side] * 2 for side in stem.stride_padding)
    _, of_weight, of_bias = torch.ops.aten.convolution_backward(
        *(of_sums, seen.inputs, stem.weight, [len(stem.weight)], stride, padding, [1, 1]),
        *(False, [0, 0], 1, [False, True, True]),
    )
    return stem._replace(weight=of_weight, bias=of_bias)


def _head(folded: Folded, weights: Tensor, seen: Seen, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of weight, bias and pooled features [C, B], from that of g."""
    pooled = seen.blocks[-1].pooled.flatten(1)
    stabiliser, quotient = head_quotients(_RULES, folded, seen.logits)
    ratio = weights * quotient
    of_ratio = v.t() @ folded.weight.t()
    # logit / (logit + stabiliser) rises by stabiliser / (logit + stabiliser)^2.
    of_logits = of_ratio * weights * stabiliser / (seen.logits + stabiliser) ** 2
    of_weight = ratio.t() @ v.t() + of_logits.t() @ pooled.t()
    return of_weight, of_logits.sum(0), folded.weight.t() @ of_logits.t()


class _ClimbedLayer(NamedTuple):
    """Values of a dense layer from the climb that the descent needs."""

    shares: Tensor
    """v A of the consumer, [C, N]."""
    hidden_shares: Tensor
    """v R / z of the 1x1 convolution times its a / z, [N, M]."""
    of_squeeze_back: Tensor
    of_grow_back: Tensor


class _ClimbedBlock(NamedTuple):
    """Values of a block from the climb that the descent needs."""

    layers: list[_ClimbedLayer]
    exit_shares: Tensor
    """v A of the exit, [C, N]."""
    of_entry_back: Tensor | None
    of_exit_magnitude: Tensor
    of_pooled: Tensor
    """Through the pool's quotients, [C, B, h, w]."""
    of_passed: Tensor
    """With respect to g of the pooled outputs, [C, B, h, w]."""


def _climb_block(block: Block, seen: SeenBlock, trace: _Trace, v: Tensor) -> _ClimbedBlock:
    """Climb a block from the gradient of g of its inputs [C, N] to that of its pooled outputs.

    It removes the last entries from the trace, to free their memory early.
    """
    passing, passed = trace.passing.pop(), trace.passed.pop()
    parts = [torch.empty_like(seen.features.y) for _ in range(1 + block.is_mixed)]
    of_entry_back = None
    if block.entry_back is None:  # it has no negative weights
        of_rows = torch.cat([v, *(torch.zeros_like(v) for _ in parts[1:])])
    else:
        of_rows, of_entry_back = block.entry_back.t() @ v, v @ _rows(passing, 0, block.size).t()
    _put(parts, 0, of_rows)
    layers = []
    for layer, seen_layer in zip(block.layers, seen.layers, strict=True):
        start = len(seen_layer.quotient)
        amounts, ratio = trace.amounts.pop(), trace.ratios.pop()
        of_amounts = _pick(layer.consumer, parts, start)
        v = of_amounts * seen_layer.quotient
        of_ratio = v.t() @ layer.squeeze_back
        of_squeeze_back = v @ ratio
        of_g = of_ratio * (seen_layer.hidden / seen_layer.z)
        rows = _rows(passing, start, start + layer.size)
        of_rows, of_grow_back = _convolution_back(
            as_images(of_g, seen.sides), _to_images(rows, seen.sides), layer.grow_back
        )
        _put(parts, start, of_rows.transpose(0, 1).flatten(1))
        shares = amounts.mul_(of_amounts), ratio.mul_(of_ratio)
        layers.append(_ClimbedLayer(*shares, of_squeeze_back, of_grow_back))
    of_amounts = _pick(block.exit, parts, len(seen.exit))
    exit_shares = trace.amounts.pop().mul_(of_amounts)
    quotients = pool_quotients(seen)
    of_scaled = _pooled(of_amounts * seen.exit, block.pool_px, seen)
    of_share = of_scaled * block.exit.magnitude[:, None, None, None]
    return _ClimbedBlock(
        layers,
        exit_shares,
        of_entry_back,
        (of_scaled * passed * quotients).flatten(1).sum(1),
        of_share * passed * STABILISER / (seen.pooled + STABILISER) ** 2,
        of_share * quotients,
    )


def _descend_block(
    block: Block, seen: SeenBlock, climbed: _ClimbedBlock, of_pooled: Tensor
) -> tuple[Block, Tensor]:
    """Return the gradients of a block and of its inputs, from that of its pooled outputs."""
    features = seen.features
    of_pooled = of_pooled.reshape(seen.pooled.shape) + climbed.of_pooled
    of_outputs = unpool(of_pooled.unsqueeze(1), block.pool_px, seen.sides)
    of_outputs = of_outputs.expand(-1, -1, -1, seen.sides[0] * seen.sides[1]).flatten(1)
    of_features = torch.zeros_like(features.y), torch.zeros_like(features.plus)
    of_exit, _ = _consumer_back(block.exit, features, of_outputs, climbed.exit_shares, of_features)
    of_exit = of_exit._replace(magnitude=of_exit.magnitude + climbed.of_exit_magnitude)
    of_layers = []
    for layer, seen_layer in zip(block.layers[::-1], seen.layers[::-1], strict=True):
        shares = climbed.layers.pop()
        hidden, start = seen_layer.hidden, len(seen_layer.quotient)
        rows = torch.cat([part[start : start + layer.size] for part in of_features])
        of_hidden, of_grow = _convolution_back(
            _to_images(rows, seen.sides), as_images(hidden, seen.sides), layer.grow
        )
        of_hidden = of_hidden.permute(0, 2, 3, 1).reshape(hidden.shape)
        of_sums = torch.ops.aten.threshold_backward(
            of_hidden + shares.hidden_shares / hidden, hidden, 0
        )
        of_both = torch.cat([of_sums, -shares.hidden_shares / seen_layer.z], 1)
        of_consumer, outputs = _consumer_back(
            layer.consumer, features, layer.squeeze @ of_both.t(), shares.shares, of_features
        )
        of_layers.append(
            layer._replace(
                consumer=of_consumer,
                squeeze=outputs @ of_both,
                squeeze_bias=of_both.sum(0),
                squeeze_back=shares.of_squeeze_back,
                grow=of_grow,
                grow_back=shares.of_grow_back,
            )
        )
    rows = torch.cat([part[: block.size] for part in of_features])
    # The first block has no entry: its inputs are both y and P.
    of_entry, of_inputs = None, rows[: block.size] + rows[block.size :]
    if block.entry is not None:
        of_entry, of_inputs = rows @ seen.inputs.flatten(1).t(), block.entry.t() @ rows
    of_block = block._replace(
        entry=of_entry, entry_back=climbed.of_entry_back, layers=of_layers[::-1], exit=of_exit
    )
    return of_block, of_inputs


def _consumer_back(
    consumer: Consumer,
    features: Features,
    of_outputs: Tensor,
    shares: Tensor,
    of_features: tuple[Tensor, Tensor],
) -> tuple[Consumer, Tensor]:
    """Return the gradients of a consumer, and its outputs [C, N].

    Its gradients of y and P are added to `of_features`, [C, N] each. `of_outputs` [C, N] is the
    gradient of its outputs except through quotients, and `shares` [C, N] is v A.
    """
    count = len(consumer.scale)
    outputs, z = features.read(consumer)
    less_of_z = torch.div(shares, z, out=z)
    of_outputs = of_outputs + shares.div_(outputs)
    if consumer.negative is not None:
        of_outputs.addcmul_(consumer.negative, less_of_z, value=-1)
    # Not a product with a mask: this drops the NaN of 0 / 0 where an output is 0.
    of_sums = torch.ops.aten.threshold_backward(of_outputs, outputs, 0)
    of_y, of_scale, of_shift = scaled_back(of_sums, features.y[:count], consumer.scale)
    less_of_plus, less_of_magnitude, less_of_floor = scaled_back(
        less_of_z, features.plus[:count], consumer.magnitude
    )
    of_features[0][:count] += of_y
    of_features[1][:count] -= less_of_plus
    of_consumer = consumer._replace(
        scale=of_scale, shift=of_shift, magnitude=-less_of_magnitude, floor=-less_of_floor
    )
    return of_consumer, outputs


def _pick(consumer: Consumer, parts: list[Tensor], count: int) -> Tensor:
    """Return the gradients of a consumer's values, [C, N], by the sign of its scale."""
    if consumer.negative is None:
        return parts[0][:count]
    return torch.where(consumer.negative > 0, parts[1][:count], parts[0][:count])


def _rows(passing: Passing, start: int, stop: int) -> Tensor:
    """Return the sums for a producer, [1 or 2 times c, N]."""
    return passing.take(start, stop).flatten(0, 1).flatten(1)


def _put(parts: list[Tensor], start: int, rows: Tensor) -> None:
    """Write the gradient of a producer's rows [1 or 2 times c, N] at its position."""
    for part, of_part in zip(parts, rows.chunk(len(parts)), strict=True):
        part[start : start + len(of_part)] = of_part


def _pooled(rows: Tensor, pool_px: int | None, seen: SeenBlock) -> Tensor:
    """Return means [C, B, h, w] over the windows of rows [C, N], the transpose of `unpool`."""
    images = rows.reshape(len(rows), -1, *seen.sides)
    return F.avg_pool2d(images, pool_px) if pool_px else F.adaptive_avg_pool2d(images, 1)


def _to_images(rows: Tensor, sides: tuple[int, int]) -> Tensor:
    """Return a view of features [c, N] as images [B, c, H, W], channels last."""
    return as_images(rows.t().contiguous(), sides)


def _convolution_back(gradient: Tensor, images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of images and weight of a 3x3 convolution, padded by 1."""
    of_images, of_weight, _ = torch.ops.aten.convolution_backward(
        *(gradient, images, weight, None, [1, 1], [1, 1], [1, 1]),
        *(False, [0, 0], 1, [True, True, False]),
    )
    return of_images, of_weight
