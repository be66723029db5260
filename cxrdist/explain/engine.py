"""The canonical preset without hooks: one pass forward, one pass back for all classes at once.

The rules are those of composite.py, the network is the one of canonise.py, folded by fold.py.
Two identities save most of the work of doing it copy by copy.

The relevance R_i of an activation a_i is carried as g_i = R_i / a_i. The z-plus rule (Bach et al.
2015, PLoS ONE 10(7), equation 60 with beta 0), R_i = a_i sum_j W+_ji R_j / z_j, then reads
g = W+^T (q g'), and the quotients q = a / z are the same for all classes.

All copies of a producer share their input and, up to a factor, their weights: what their consumers
pass back adds up before the transposed convolution, of which there is one for each producer.

Layout: the features of a block are [channels, images, height, width], so that a concatenation is a
range of rows and a 1x1 convolution one matrix product; hidden layers are [images, height, width,
channels], which a 3x3 convolution reads without a copy. Targets stand before the images in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.models.densenet import DenseNet
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from cxrdist.explain.attribution import STABILISER, Attribution, concatenate
from cxrdist.explain.fold import Block, Consumer, bias_of, fold

MAPS_AT_ONCE = 16
"""Images times targets of one pass back; what is more takes several, so memory is bounded."""


class Engine:
    """LRP of one DenseNet by the canonical preset; keeps folded weights of its own."""

    def __init__(self, network: DenseNet, flat: bool, biases: bool, epsilon: float) -> None:
        """Fold the network, which is left as it is.

        Args:
            network: timm's DenseNet in evaluation mode.
            flat: the rule of the first convolution: flat, or else z-plus.
            biases: whether biases are part of the denominators and absorb their share.
            epsilon: of the linear layer's rule.

        Raises:
            CxrdistError: the network is in training mode, or has a layer that is not known here.
        """
        self._folded = fold(network, biases)
        self._flat, self._biases, self._epsilon = flat, biases, epsilon

    @torch.no_grad()
    def attribute(self, inputs: Tensor, targets: list[int]) -> Attribution:
        """Relevance of normalised images [B, C, H, W] for the classes of these numbers."""
        seen = self._forward(inputs)
        at_once = max(1, MAPS_AT_ONCE // len(inputs))
        chunks = [targets[i : i + at_once] for i in range(0, len(targets), at_once)]
        return concatenate([self._backward(seen, chunk) for chunk in chunks])

    def _forward(self, inputs: Tensor) -> "_Seen":
        folded = self._folded
        first = folded.stem(inputs).relu_()
        pooled, places = F.max_pool2d(first, *folded.max_pool, return_indices=True)
        features = pooled.transpose(0, 1).contiguous()
        blocks = [_forward_block(folded.blocks[0], features)]
        for block in folded.blocks[1:]:
            blocks.append(_forward_block(block, blocks[-1].pooled))
        logits = F.linear(blocks[-1].pooled.flatten(1).t(), folded.weight, folded.bias)
        return _Seen(inputs, first, places, features, blocks, logits)

    def _backward(self, seen: "_Seen", targets: list[int]) -> Attribution:
        logits = seen.logits[:, targets].t()
        ledger = _Ledger(logits)
        passed = self._backward_head(logits, targets, ledger)
        for block, found in zip(self._folded.blocks[::-1], seen.blocks[::-1], strict=True):
            passed = _backward_block(block, found, passed, ledger)
        pooled = (seen.features.unsqueeze(1) * passed).permute(1, 2, 0, 3, 4).contiguous()
        first = torch.stack([_backward_max_pool(self._folded.max_pool, seen, r) for r in pooled])
        relevance = (self._backward_flat if self._flat else self._backward_z_plus)(
            seen, first, ledger
        )
        sums = relevance.flatten(2).sum(2, dtype=torch.float64), *ledger.shares
        columns = [value.t().to(logits.dtype) for value in sums]
        return Attribution(relevance.transpose(0, 1), logits.t(), *columns)

    def _backward_head(self, logits: Tensor, targets: list[int], ledger: "_Ledger") -> Tensor:
        """The epsilon rule: from logits [K, B] to g of the pooled features, [C, K, B, 1, 1]."""
        bias = self._folded.bias[targets, None]
        z = logits if self._biases else logits - bias
        stabiliser = self._epsilon * (1 - 2 * (z < 0).to(z.dtype))
        ratio = logits / (z + stabiliser)
        ledger.book(torch.stack([ratio * bias * self._biases, ratio * stabiliser]))
        return (self._folded.weight[targets].t().unsqueeze(2) * ratio)[..., None, None]

    def _backward_flat(self, seen: "_Seen", relevance: Tensor, ledger: "_Ledger") -> Tensor:
        """Spread relevance [K, B, C, h, w] evenly over the windows; gives [K, B, H, W]."""
        stem, inputs = self._folded.stem, seen.inputs
        place = stem.stride[0], int(stem.padding[0])
        ones = torch.ones_like(stem.weight[:1, :1])
        z = F.conv2d(torch.ones_like(inputs[:1, :1]), ones, None, *place) * inputs.shape[1]
        ratio = relevance.sum(2) / (z[0] + STABILISER)
        ledger.book(torch.stack([torch.zeros_like(ratio), ratio * STABILISER]))
        size = (ratio.shape[0] * ratio.shape[1], 1, *inputs.shape[2:])
        shares = conv2d_input(size, ones, ratio.flatten(0, 1).unsqueeze(1), *place)
        return shares.reshape(*ratio.shape[:2], *size[2:]) * inputs.shape[1]

    def _backward_z_plus(self, seen: "_Seen", relevance: Tensor, ledger: "_Ledger") -> Tensor:
        """Z-plus for inputs of both signs: the parts x+ w+ and x- w-; shapes as for flat."""
        stem, inputs = self._folded.stem, seen.inputs
        place = stem.stride[0], int(stem.padding[0])
        weight = torch.cat([stem.weight.clamp(min=0), (-stem.weight).clamp(min=0)], 1)
        parts = torch.cat([inputs.clamp(min=0), (-inputs).clamp(min=0)], 1)
        bias = bias_of(stem).clamp(min=0) * self._biases
        ratio = relevance / (F.conv2d(parts, weight, bias, *place) + STABILISER)
        per_channel = ratio.flatten(3).sum(3)
        ledger.book(torch.stack([per_channel @ bias, per_channel.sum(2) * STABILISER]))
        shares = [parts * conv2d_input(parts.shape, weight, one, *place) for one in ratio]
        return torch.stack(shares).sum(2)


@dataclass(frozen=True)
class _SeenBlock:
    """What the pass back needs of a block. Quotients are a / z of a rule, N is B * H * W."""

    layers: list[tuple[Tensor, Tensor]]
    """Quotients of the consumer [C, N] and of the hidden layer [N, M]."""
    exit: Tensor
    """Quotients of the exit [C, N]."""
    pool: Tensor
    """Quotients of the pool behind it [C, B, h, w]."""
    pooled: Tensor
    """What the pool gives [C, B, h, w]."""
    sides: tuple[int, int]
    """H, W before the pool."""


@dataclass(frozen=True)
class _Seen:
    """What the pass back needs of the pass forward."""

    inputs: Tensor
    """[B, C, H, W]."""
    first: Tensor
    """Behind the first convolution and its ReLU [B, C, H, W]."""
    places: Tensor
    """Of the maxima."""
    features: Tensor
    """Behind the max pool [C, B, H, W]."""
    blocks: list[_SeenBlock]
    logits: Tensor
    """[B, classes]."""


class _Ledger:
    """What biases and stabilisers absorb, float64 [2, K, B]."""

    def __init__(self, logits: Tensor) -> None:
        self.shares = logits.new_zeros(2, *logits.shape, dtype=torch.float64)

    def book(self, absorbed: Tensor) -> None:
        """Add what was absorbed in each place, [2, K * B * places] in any shape."""
        places = absorbed.reshape(*self.shares.shape, -1)
        self.shares += places.sum(3, dtype=torch.float64)


class _Features:
    """The producers of a block, side by side: their outputs y and the two P, [C, N] each."""

    def __init__(self, block: Block, inputs: Tensor) -> None:
        shape = len(block.exit.shift), inputs[0].numel()
        self._y, self._plus = inputs.new_empty(shape), inputs.new_empty(shape)
        self._minus = inputs.new_empty(shape) if block.is_mixed else None
        self._count = 0

    def add(self, parts: Sequence[Tensor]) -> None:
        """Add a producer's y, P of W+ and perhaps P of W-, [c, N] each.

        Without the last it is the difference of the others. Where a bias stands in the denominator
        that is exact enough: P of W+ cannot be the larger one where a consumer with a negative
        scale is active, but for what its bias makes up for.
        """
        rows = slice(self._count, self._count + len(parts[0]))
        self._y[rows], self._plus[rows] = parts[0], parts[1]
        if self._minus is not None:
            minus = parts[2] if len(parts) > 2 else (parts[1] - parts[0]).clamp_(min=0)
            self._minus[rows] = minus
        self._count = rows.stop

    def read(self, consumer: Consumer) -> tuple[Tensor, Tensor]:
        """What a consumer makes of them and its quotients a / z, [C, N] each."""
        count = self._count
        outputs = consumer.read(self._y[:count])
        minus = None if self._minus is None else self._minus[:count]
        return outputs, outputs / consumer.denominator(self._plus[:count], minus)


class _Passing:
    """What consumers pass back to the producers of a block: for W+, and for W- if needed."""

    def __init__(self, block: Block, amounts: Tensor) -> None:
        self._parts = list(_by_sign(block.exit, amounts))
        if block.is_mixed and len(self._parts) == 1:
            self._parts.append(torch.zeros_like(amounts))

    def add(self, consumer: Consumer, amounts: Tensor) -> None:
        """Add what a consumer passes, [C, K, B, H * W]."""
        for total, part in zip(self._parts, _by_sign(consumer, amounts), strict=False):
            total[: len(part)] += part

    def take(self, start: int, stop: int | None = None) -> Tensor:
        """What the producer with these channels gets, [1 or 2, c, K, B, H * W]."""
        return torch.stack([part[start:stop] for part in self._parts])


def _by_sign(consumer: Consumer, amounts: Tensor) -> tuple[Tensor, ...]:
    """Split amounts [C, ...] by the sign of the consumer's scale; the others are 0."""
    if consumer.sign is None:
        return (amounts,)
    minus = amounts * (consumer.sign < 0).reshape(-1, *[1] * (amounts.ndim - 1))
    return amounts.sub_(minus), minus


def _forward_block(block: Block, inputs: Tensor) -> _SeenBlock:
    """From the inputs [C, B, H, W] of the entry to what the pool behind the block gives."""
    num_images, height, width = inputs.shape[1:]
    features = _Features(block, inputs)
    rows = inputs.flatten(1)
    features.add([rows, rows] if block.entry is None else (block.entry @ rows).split(block.size))
    layers = []
    for layer in block.layers:
        outputs, quotient = features.read(layer.consumer)
        sums, z = torch.addmm(layer.squeeze_bias, outputs.t(), layer.squeeze).chunk(2, 1)
        hidden = sums.clamp(min=0)
        layers.append((quotient, hidden / z))
        images = hidden.reshape(num_images, height, width, -1).permute(0, 3, 1, 2)
        grown = F.conv2d(images, layer.grow, padding=1).transpose(0, 1).flatten(1)
        features.add(grown.split(layer.size))
    outputs, quotient = features.read(block.exit)
    images = outputs.reshape(-1, num_images, height, width)
    size_px = block.pool_px
    pooled = F.avg_pool2d(images, size_px) if size_px else F.adaptive_avg_pool2d(images, 1)
    pooled *= block.exit.scale[..., None, None]
    return _SeenBlock(layers, quotient, pooled / (pooled + STABILISER), pooled, (height, width))


def _backward_block(block: Block, seen: _SeenBlock, passed: Tensor, ledger: _Ledger) -> Tensor:
    """From g of the pooled outputs [C, K, B, h, w] to g of the inputs [C, K, B, H, W]."""
    height, width = seen.sides
    _, num_targets, num_images = passed.shape[:3]
    share = passed * seen.pool.unsqueeze(1)
    ledger.book(torch.stack([torch.zeros_like(share[0]), share.sum(0) * STABILISER]))
    g = _unpool(share * block.exit.scale[..., None, None, None], block.pool_px, seen.sides)
    passing = _Passing(block, _amounts(block.exit, seen.exit, g, ledger))
    for layer, (quotient, hidden) in zip(block.layers[::-1], seen.layers[::-1], strict=True):
        start = len(quotient)
        rows = passing.take(start, start + layer.size)
        images = rows.permute(2, 3, 4, 0, 1).reshape(-1, height, width, rows[:, :, 0, 0, 0].numel())
        g = F.conv2d(images.permute(0, 3, 1, 2), layer.grow_back, padding=1).permute(0, 2, 3, 1)
        ratio = g.reshape(num_targets, *hidden.shape) * hidden
        ledger.book((ratio @ layer.absorbed).movedim(2, 0))
        g = layer.squeeze_back @ ratio.flatten(0, 1).t()
        g = g.reshape(start, num_targets, num_images, -1)
        passing.add(layer.consumer, _amounts(layer.consumer, quotient, g, ledger))
    rows = passing.take(0, block.size)
    g = rows[0] if block.entry_back is None else block.entry_back @ rows.flatten(0, 1).flatten(1)
    return g.reshape(-1, num_targets, num_images, height, width)


def _amounts(consumer: Consumer, quotient: Tensor, g: Tensor, ledger: _Ledger) -> Tensor:
    """What a consumer passes to the producers, from g of its outputs; [C, K, B, H * W] both."""
    amounts = g * quotient.reshape(len(g), 1, g.shape[2], -1)
    ledger.book(consumer.absorbed @ amounts.flatten(1))
    return amounts


def _unpool(share: Tensor, pool_px: int | None, sides: tuple[int, int]) -> Tensor:
    """Spread [C, K, B, h, w] over the windows of an average pool: [C, K, B, H * W].

    Of all pixels it is [C, K, B, 1], to be broadcast.
    """
    if pool_px is None:
        return share.flatten(3) / (sides[0] * sides[1])
    height, width = share.shape[3:]
    windows = (share / pool_px**2)[..., :, None, :, None].expand(
        *share.shape[:4], pool_px, width, pool_px
    )
    spread = windows.reshape(*share.shape[:3], height * pool_px, width * pool_px)
    rest = (0, sides[1] - spread.shape[4], 0, sides[0] - spread.shape[3])
    return F.pad(spread, rest).flatten(3)


def _backward_max_pool(pool: tuple[int, int, int], seen: _Seen, relevance: Tensor) -> Tensor:
    """Give each maximum the relevance of its window, [B, C, h, w] to [B, C, H, W]."""
    window = *((side, side) for side in pool), (1, 1), False
    routed: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
        relevance, seen.first, *window, seen.places
    )
    return routed
