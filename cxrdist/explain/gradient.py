"""The relevance map as a differentiable function of the weights, for a loss on it.

The map is the engine's, pass forward and pass back. Its gradient takes both again in the opposite
order (reverse mode): from the pixels up to the logits through the pass back, which is linear in
what it passes, and down from the logits through the pass forward. Within a block the engine writes
all features into one array, and so does this: nothing is copied for each consumer.

What a rule passes on is A = g a / z. With v, the gradient with respect to A, those with respect to
a and z are v A / a and - v A / z: the share v A serves both. Where a is 0, its ReLU stops it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from cxrdist.explain.attribution import STABILISER
from cxrdist.explain.engine import (
    Features,
    Passing,
    Rules,
    Seen,
    SeenBlock,
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

_RULES = Rules()


def relevance(model: Classifier, inputs: Tensor, weights: Tensor) -> Tensor:
    """Relevance of the weighted sum of the logits by the canonical preset (relevance.py).

    The network is taken as it is used: running statistics and no dropout, whatever its mode. The
    result can be differentiated once, with respect to the parameters. torch.compile cannot record
    it: call it beside what is compiled.

    Args:
        model: those of its parameters that require gradients get them; all others are constants.
        inputs: grey images, float [B, 1, H, W] with values 0..255.
        weights: float [B, classes], constants; an image starts with weights times logits. A one is
            the map of a class, a one and a minus one that of a contrast.

    Returns:
        Float [B, H, W], in the dtype of the model.
    """
    with torch.autocast(inputs.device.type, enabled=False):
        folded = fold(model.network, _RULES.biases, ask=inputs.device.type == "cpu")
        leaves, structure = tree_flatten(folded)
        images = model.normalise(inputs).detach()
        result: Tensor = _Map.apply(images, weights.detach().to(images.dtype), structure, *leaves)
        return result


class _Map(torch.autograd.Function):
    """The map of a folded network, and its gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weights: Tensor, structure: Any, *leaves: Any) -> Tensor:
        """Relevance [B, H, W] of normalised images [B, C, H, W]."""
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
            raise RuntimeError("the map can be differentiated once: what that needs is used up")
        (folded, structure, weights, seen, trace), ctx.kept = ctx.kept, None
        needed = ctx.needs_input_grad[3:]
        lowest = _lowest(tree_unflatten(needed, structure))
        with torch.autocast(gradient.device.type, enabled=False):
            of_folded = _gradient(folded, weights, seen, trace, gradient.contiguous(), lowest)
        found = tree_flatten(of_folded)[0]
        of_leaves = (f if is_needed else None for f, is_needed in zip(found, needed, strict=True))
        return None, None, None, *of_leaves


def _lowest(needed: Folded) -> int:
    """Number of the first block that has a part with a gradient, -1 if the stem has one."""
    for number, part in enumerate([needed.stem, *needed.blocks], -1):
        if any(tree_flatten(part)[0]):
            return number
    return len(needed.blocks)


@dataclass(frozen=True)
class _Trace:
    """What the pass back multiplies with, in its order; a `Watcher`."""

    amounts: list[Tensor]
    """What each consumer passes, [C, N]."""
    ratios: list[Tensor]
    """R / z of each 1x1 convolution, [N, M]."""
    passing: list[Passing]
    """What each block passes to its producers."""
    passed: list[Tensor]
    """What each block gets, [C, B, h, w]."""

    def see_amounts(self, consumer: Consumer, amounts: Tensor) -> None:
        """Keep what a consumer passes."""
        self.amounts.append(amounts.flatten(1))

    def see_ratio(self, layer: Layer, ratio: Tensor) -> None:
        """Keep R / z of a 1x1 convolution."""
        self.ratios.append(ratio.squeeze(0))

    def see_absorbed(self, bias: Tensor | None, stabiliser: Tensor) -> None:
        """Keep nothing: only the ledger needs it."""

    def see_block(self, passed: Tensor, passing: Passing) -> None:
        """Keep what a block gets and what it passes."""
        self.passed.append(passed.squeeze(1))
        self.passing.append(passing)


def _gradient(
    folded: Folded, weights: Tensor, seen: Seen, trace: _Trace, gradient: Tensor, lowest: int
) -> Folded:
    """Gradients with respect to the parts of a folded network, from that of the map [B, H, W].

    Blocks below the lowest are frozen; the parts themselves stand there, and for other constants.
    """
    of_routed = _climb_stem(folded.stem, seen, gradient)
    v = (of_routed * seen.features).flatten(1)
    passed = trace.passing[-1].take(0, len(of_routed))[0]
    of_inputs = (of_routed * passed.reshape(of_routed.shape)).flatten(1)
    climbed = []
    for block, found in zip(folded.blocks, seen.blocks, strict=True):
        climbed.append(_climb_block(block, found, trace, v))
        v = climbed[-1].of_passed.flatten(1)
    of_weight, of_bias, of_pooled = _head(folded, weights, seen, v)
    of_blocks = list(folded.blocks)
    for number in range(len(of_blocks) - 1, max(lowest, 0) - 1, -1):
        parts = folded.blocks[number], seen.blocks[number], climbed.pop()
        of_blocks[number], of_pooled = _descend_block(*parts, of_pooled)
    of_stem = folded.stem
    if lowest < 0:
        of_stem = _descend_stem(folded.stem, seen, (of_inputs + of_pooled).reshape(of_routed.shape))
    return Folded(of_stem, of_blocks, of_weight, of_bias)


def _climb_stem(stem: Stem, seen: Seen, gradient: Tensor) -> Tensor:
    """From the map's gradient to that of the relevance behind the max pool, [C, B, H, W]."""
    ones = torch.ones_like(stem.weight[:1, :1])
    spread = F.conv2d(gradient.unsqueeze(1), ones, None, *stem.place) * seen.inputs.shape[1]
    of_first = (spread / (window_sizes(stem, seen.inputs) + STABILISER)).flatten(2)
    num_channels = len(stem.weight)
    picked = of_first.expand(-1, num_channels, -1).gather(2, seen.places.flatten(2))
    return picked.reshape(seen.places.shape).transpose(0, 1).contiguous()


def _descend_stem(stem: Stem, seen: Seen, of_features: Tensor) -> Stem:
    """From the gradient behind the max pool [C, B, H, W] to those of the first convolution."""
    of_first = backward_max_pool(stem, seen, of_features.transpose(0, 1).contiguous())
    of_sums = torch.ops.aten.threshold_backward(of_first, seen.first, 0)
    stride, padding = ([side] * 2 for side in stem.place)
    _, of_weight, of_bias = torch.ops.aten.convolution_backward(
        *(of_sums, seen.inputs, stem.weight, [len(stem.weight)], stride, padding, [1, 1]),
        *(False, [0, 0], 1, [False, True, True]),
    )
    return stem._replace(weight=of_weight, bias=of_bias)


def _head(folded: Folded, weights: Tensor, seen: Seen, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, bias and pooled features [C, B], from that of the relevance's g."""
    pooled = seen.blocks[-1].pooled.flatten(1)
    stabiliser, quotient = head_quotients(_RULES, folded, seen.logits)
    ratio = weights * quotient
    of_ratio = v.t() @ folded.weight.t()
    # logit / (logit + stabiliser) rises by stabiliser / (logit + stabiliser)^2.
    of_logits = of_ratio * weights * stabiliser / (seen.logits + stabiliser) ** 2
    of_weight = ratio.t() @ v.t() + of_logits.t() @ pooled.t()
    return of_weight, of_logits.sum(0), folded.weight.t() @ of_logits.t()


class _ClimbedLayer(NamedTuple):
    """What the way up through a dense layer leaves for the way down."""

    shares: Tensor
    """v A of the consumer, [C, N]."""
    hidden_shares: Tensor
    """v R / z of the 1x1 convolution times its a / z, [N, M]."""
    of_squeeze_back: Tensor
    of_grow_back: Tensor


class _ClimbedBlock(NamedTuple):
    """What the way up through a block leaves for the way down."""

    layers: list[_ClimbedLayer]
    exit_shares: Tensor
    """v A of the exit, [C, N]."""
    of_entry_back: Tensor | None
    of_exit_size: Tensor
    of_pooled: Tensor
    """By way of the pool's quotients, [C, B, h, w]."""
    of_passed: Tensor
    """With respect to g of the pooled outputs, [C, B, h, w]."""


def _climb_block(block: Block, seen: SeenBlock, trace: _Trace, v: Tensor) -> _ClimbedBlock:
    """From the gradient of g of a block's inputs [C, N] to that of g of its pooled outputs.

    It uses the trace up from its end.
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
    for layer, found in zip(block.layers, seen.layers, strict=True):
        start = len(found.quotient)
        amounts, ratio = trace.amounts.pop(), trace.ratios.pop()
        of_amounts = _pick(layer.consumer, parts, start)
        v = of_amounts * found.quotient
        of_ratio = v.t() @ layer.squeeze_back
        of_squeeze_back = v @ ratio
        of_g = of_ratio * (found.hidden / found.z)
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
    of_share = of_scaled * block.exit.size[:, None, None, None]
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
    """From the gradient of the pooled outputs [C, N] to those of all parts and of the inputs."""
    features = seen.features
    of_pooled = of_pooled.reshape(seen.pooled.shape) + climbed.of_pooled
    of_outputs = unpool(of_pooled.unsqueeze(1), block.pool_px, seen.sides)
    of_outputs = of_outputs.expand(-1, -1, -1, seen.sides[0] * seen.sides[1]).flatten(1)
    of_features = torch.zeros_like(features.y), torch.zeros_like(features.plus)
    of_exit, _ = _consumer_back(block.exit, features, of_outputs, climbed.exit_shares, of_features)
    of_exit = of_exit._replace(size=of_exit.size + climbed.of_exit_size)
    of_layers = []
    for layer, found in zip(block.layers[::-1], seen.layers[::-1], strict=True):
        shares = climbed.layers.pop()
        start = len(found.quotient)
        rows = torch.cat([part[start : start + layer.size] for part in of_features])
        of_hidden, of_grow = _convolution_back(
            _to_images(rows, seen.sides), as_images(found.hidden, seen.sides), layer.grow
        )
        of_hidden = of_hidden.permute(0, 2, 3, 1).reshape(found.hidden.shape)
        of_sums = torch.ops.aten.threshold_backward(
            of_hidden + shares.hidden_shares / found.hidden, found.hidden, 0
        )
        of_both = torch.cat([of_sums, -shares.hidden_shares / found.z], 1)
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
    """Return the gradients of a consumer; those of the features are added to what is there.

    Args:
        consumer: that read the features.
        features: of its block.
        of_outputs: gradient of its outputs, but for their part in quotients, [C, N].
        shares: v A, [C, N].
        of_features: gradients of y and P, [C, N] each.

    Returns:
        Gradients of the consumer; and its outputs [C, N].
    """
    count = len(consumer.scale)
    outputs, z = features.read(consumer)
    less_of_z = torch.div(shares, z, out=z)
    of_outputs = of_outputs + shares.div_(outputs)
    if consumer.negative is not None:
        of_outputs.addcmul_(consumer.negative, less_of_z, value=-1)
    # A selection: what is 0 / 0 where an output is 0 does not get through.
    of_sums = torch.ops.aten.threshold_backward(of_outputs, outputs, 0)
    of_y, of_scale, of_shift = scaled_back(of_sums, features.y[:count], consumer.scale)
    less_of_plus, less_of_size, less_of_floor = scaled_back(
        less_of_z, features.plus[:count], consumer.size
    )
    of_features[0][:count] += of_y
    of_features[1][:count] -= less_of_plus
    of_consumer = consumer._replace(
        scale=of_scale, shift=of_shift, size=-less_of_size, floor=-less_of_floor
    )
    return of_consumer, outputs


def _pick(consumer: Consumer, parts: list[Tensor], count: int) -> Tensor:
    """Return the gradients of what a consumer passes, [C, N], by the sign of its scale."""
    if consumer.negative is None:
        return parts[0][:count]
    return torch.where(consumer.negative > 0, parts[1][:count], parts[0][:count])


def _rows(passing: Passing, start: int, stop: int) -> Tensor:
    """Return what a producer got, [1 or 2 times c, N]."""
    return passing.take(start, stop).flatten(0, 1).flatten(1)


def _put(parts: list[Tensor], start: int, rows: Tensor) -> None:
    """Write the gradient of a producer's rows [1 or 2 times c, N] where they belong."""
    for part, of_part in zip(parts, rows.chunk(len(parts)), strict=True):
        part[start : start + len(of_part)] = of_part


def _pooled(rows: Tensor, pool_px: int | None, seen: SeenBlock) -> Tensor:
    """Means [C, B, h, w] over the windows of rows [C, N]: what `unpool` is transposed."""
    images = rows.reshape(len(rows), -1, *seen.sides)
    return F.avg_pool2d(images, pool_px) if pool_px else F.adaptive_avg_pool2d(images, 1)


def _to_images(rows: Tensor, sides: tuple[int, int]) -> Tensor:
    """Features [c, N] as images [B, c, H, W], channels last."""
    return as_images(rows.t().contiguous(), sides)


def _convolution_back(gradient: Tensor, images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of images and weight of a 3x3 convolution, padded by 1."""
    of_images, of_weight, _ = torch.ops.aten.convolution_backward(
        *(gradient, images, weight, None, [1, 1], [1, 1], [1, 1]),
        *(False, [0, 0], 1, [True, True, False]),
    )
    return of_images, of_weight
