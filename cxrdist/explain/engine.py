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
from typing import NamedTuple, Protocol

import torch
from timm.models.densenet import DenseNet
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from cxrdist.explain.attribution import STABILISER, Attribution, concatenate
from cxrdist.explain.canonise import check
from cxrdist.explain.fold import Block, Consumer, Folded, Layer, Stem, fold

MAPS_AT_ONCE = 16
"""Images times targets of one pass back; what is more takes several, so memory is bounded."""


class Engine:
    """LRP of one DenseNet by the canonical preset; keeps folded weights of its own."""

    @torch.no_grad()
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
        check(network)
        self._folded = fold(network, biases)
        self._rules = Rules(flat, biases, epsilon)

    @torch.no_grad()
    def attribute(self, inputs: Tensor, targets: list[int]) -> Attribution:
        """Relevance of normalised images [B, C, H, W] for the classes of these numbers."""
        seen = forward_pass(self._folded, inputs)
        at_once = max(1, MAPS_AT_ONCE // len(inputs))
        chunks = [targets[i : i + at_once] for i in range(0, len(targets), at_once)]
        return concatenate([self._backward(seen, chunk) for chunk in chunks])

    def _backward(self, seen: "Seen", targets: list[int]) -> Attribution:
        logits = seen.logits[:, targets]
        starts = torch.zeros_like(seen.logits).repeat(len(targets), 1, 1)
        starts[range(len(targets)), :, targets] = 1
        ledger = _Ledger(logits.t())
        relevance = backward_pass(self._folded, self._rules, seen, starts, ledger)
        sums = relevance.flatten(2).sum(2, dtype=torch.float64), *ledger.shares
        columns = [value.t().to(logits.dtype) for value in sums]
        return Attribution(relevance.transpose(0, 1), logits, *columns)


class Rules(NamedTuple):
    """Settings of the canonical preset."""

    flat: bool = True
    """The rule of the first convolution: flat, or else z-plus."""
    biases: bool = True
    """Whether biases are part of the denominators and absorb their share."""
    epsilon: float = 0.1
    """Of the linear layer's rule, in units of the logit."""


class Watcher(Protocol):
    """Is shown what a pass back multiplies with the denominators' parts."""

    def see_amounts(self, consumer: Consumer, amounts: Tensor) -> None:
        """What a consumer passes to the producers, |s| R / z times its input's share, [C, K*N]."""

    def see_ratio(self, layer: Layer, ratio: Tensor) -> None:
        """R / z of the 1x1 convolution, [K, N, M]."""

    def see_absorbed(self, bias: Tensor | None, stabiliser: Tensor) -> None:
        """Return what another rule's bias and stabiliser absorb, [K, B, ...]."""

    def see_block(self, passed: Tensor, passing: "Passing") -> None:
        """Return what a block got, [C, K, B, h, w], and all that its producers get."""


def forward_pass(folded: Folded, inputs: Tensor) -> "Seen":
    """Compute logits, and what the passes back need, of normalised images [B, C, H, W]."""
    stem = folded.stem
    first = F.conv2d(inputs, stem.weight, stem.bias, *stem.place).relu_()
    pooled, places = F.max_pool2d(first, *stem.max_pool, return_indices=True)
    features = pooled.transpose(0, 1).contiguous()
    blocks = [_forward_block(folded.blocks[0], features)]
    for block in folded.blocks[1:]:
        blocks.append(_forward_block(block, blocks[-1].pooled))
    logits = F.linear(blocks[-1].pooled.flatten(1).t(), folded.weight, folded.bias)
    return Seen(inputs, first, places, features, blocks, logits)


def backward_pass(
    folded: Folded, rules: Rules, seen: "Seen", starts: Tensor, watcher: Watcher
) -> Tensor:
    """Pass relevance from the logits back to the pixels.

    Args:
        folded: the network.
        rules: how.
        seen: by `forward_pass`.
        starts: [K, B, classes], what of each logit is to be explained.
        watcher: is shown each step.

    Returns:
        Relevance [K, B, H, W].
    """
    passed = _backward_head(folded, rules, seen.logits, starts, watcher)
    for block, found in zip(folded.blocks[::-1], seen.blocks[::-1], strict=True):
        passed = _backward_block(block, found, passed, watcher)
    pooled = (seen.features.unsqueeze(1) * passed).permute(1, 2, 0, 3, 4).contiguous()
    first = torch.stack([backward_max_pool(folded.stem, seen, r) for r in pooled])
    if rules.flat:
        return _backward_flat(folded.stem, seen, first, watcher)
    return _backward_z_plus(folded.stem, rules, seen, first, watcher)


def head_quotients(rules: Rules, folded: Folded, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the epsilon rule's stabiliser and logit / z of each logit."""
    z = logits if rules.biases else logits - folded.bias
    stabiliser = rules.epsilon * (1 - 2 * (z < 0).to(z.dtype))
    return stabiliser, logits / (z + stabiliser)


def _backward_head(
    folded: Folded, rules: Rules, logits: Tensor, starts: Tensor, watcher: Watcher
) -> Tensor:
    """The epsilon rule: from starts [K, B, classes] to g of pooled features, [C, K, B, 1, 1]."""
    stabiliser, quotient = head_quotients(rules, folded, logits)
    ratio = starts * quotient
    watcher.see_absorbed(ratio * folded.bias * rules.biases, ratio * stabiliser)
    return (ratio @ folded.weight).movedim(2, 0)[..., None, None]


def window_sizes(stem: Stem, inputs: Tensor) -> Tensor:
    """Return the number of input values in each window of the first convolution, [1, 1, h, w]."""
    ones = torch.ones_like(stem.weight[:1, :1])
    return F.conv2d(torch.ones_like(inputs[:1, :1]), ones, None, *stem.place) * inputs.shape[1]


def _backward_flat(stem: Stem, seen: "Seen", relevance: Tensor, watcher: Watcher) -> Tensor:
    """Spread relevance [K, B, C, h, w] evenly over the windows; gives [K, B, H, W]."""
    inputs = seen.inputs
    ratio = relevance.sum(2) / (window_sizes(stem, inputs)[0] + STABILISER)
    watcher.see_absorbed(None, ratio * STABILISER)
    size = (ratio.shape[0] * ratio.shape[1], 1, *inputs.shape[2:])
    ones = torch.ones_like(stem.weight[:1, :1])
    shares = conv2d_input(size, ones, ratio.flatten(0, 1).unsqueeze(1), *stem.place)
    return shares.reshape(*ratio.shape[:2], *size[2:]) * inputs.shape[1]


def _backward_z_plus(
    stem: Stem, rules: Rules, seen: "Seen", relevance: Tensor, watcher: Watcher
) -> Tensor:
    """Z-plus for inputs of both signs: the parts x+ w+ and x- w-; shapes as for flat."""
    weight = torch.cat([stem.weight.clamp(min=0), (-stem.weight).clamp(min=0)], 1)
    parts = torch.cat([seen.inputs.clamp(min=0), (-seen.inputs).clamp(min=0)], 1)
    bias = stem.bias.clamp(min=0) * rules.biases
    ratio = relevance / (F.conv2d(parts, weight, bias, *stem.place) + STABILISER)
    per_channel = ratio.flatten(3).sum(3)
    watcher.see_absorbed(per_channel @ bias, per_channel.sum(2) * STABILISER)
    shares = [parts * conv2d_input(parts.shape, weight, one, *stem.place) for one in ratio]
    return torch.stack(shares).sum(2)


@dataclass(frozen=True)
class SeenLayer:
    """What the passes back need of a dense layer. N is B * H * W."""

    quotient: Tensor
    """a / z of the consumer [C, N]."""
    hidden: Tensor
    """[N, M]."""
    z: Tensor
    """Of the 1x1 convolution [N, M]."""


@dataclass(frozen=True)
class SeenBlock:
    """What the passes back need of a block."""

    inputs: Tensor
    """[C, B, H, W]."""
    features: "Features"
    layers: list[SeenLayer]
    exit: Tensor
    """Quotients a / z of the exit [C, N]."""
    pooled: Tensor
    """What the pool behind it gives [C, B, h, w]."""
    sides: tuple[int, int]
    """H, W before the pool."""


@dataclass(frozen=True)
class Seen:
    """What the passes back need of the pass forward."""

    inputs: Tensor
    """[B, C, H, W]."""
    first: Tensor
    """Behind the first convolution and its ReLU [B, C, H, W]."""
    places: Tensor
    """Positions of the maxima."""
    features: Tensor
    """Behind the max pool [C, B, H, W]."""
    blocks: list[SeenBlock]
    logits: Tensor
    """[B, classes]."""


class _Ledger:
    """What biases and stabilisers absorb, float64 [2, K, B]; a `Watcher`."""

    def __init__(self, logits: Tensor) -> None:
        self.shares = logits.new_zeros(2, *logits.shape, dtype=torch.float64)

    def see_amounts(self, consumer: Consumer, amounts: Tensor) -> None:
        """Add what a consumer absorbs."""
        self._book(consumer.absorbed @ amounts.flatten(1))

    def see_ratio(self, layer: Layer, ratio: Tensor) -> None:
        """Add what a 1x1 convolution absorbs."""
        self._book((ratio @ layer.absorbed).movedim(2, 0))

    def see_absorbed(self, bias: Tensor | None, stabiliser: Tensor) -> None:
        """Add what another rule absorbs."""
        self._book(
            torch.stack([torch.zeros_like(stabiliser) if bias is None else bias, stabiliser])
        )

    def see_block(self, passed: Tensor, passing: "Passing") -> None:
        """Add nothing: what is passed on is not absorbed."""

    def _book(self, absorbed: Tensor) -> None:
        """Add what was absorbed in each place, [2, K * B * places] in any shape."""
        places = absorbed.reshape(*self.shares.shape, -1)
        self.shares += places.sum(3, dtype=torch.float64)


class Features:
    """The producers of a block, side by side: their outputs y and P of W+, and perhaps of W-.

    Attributes:
        y: [C, N].
        plus: [C, N].
    """

    def __init__(self, block: Block, inputs: Tensor) -> None:
        shape = len(block.exit.shift), inputs[0].numel()
        self.y, self.plus = inputs.new_empty(shape), inputs.new_empty(shape)
        self._minus = inputs.new_empty(shape) if block.with_minus else None
        self._count = 0

    def add(self, parts: Sequence[Tensor]) -> None:
        """Add a producer's y, P of W+ and perhaps P of W-, [c, N] each."""
        rows = slice(self._count, self._count + len(parts[0]))
        self.y[rows], self.plus[rows] = parts[0], parts[1]
        if self._minus is not None:
            self._minus[rows] = parts[2] if len(parts) > 2 else parts[1] - parts[0]
        self._count = rows.stop

    def read(self, consumer: Consumer) -> tuple[Tensor, Tensor]:
        """Return what a consumer makes of them and its z-plus, [C, N] each."""
        count = len(consumer.scale)
        outputs = consumer.read(self.y[:count])
        minus = None if self._minus is None else self._minus[:count]
        return outputs, consumer.denominator(self.plus[:count], minus, outputs)


class Passing:
    """What consumers pass back to the producers of a block: for W+, and for W- if needed."""

    def __init__(self, block: Block, amounts: Tensor) -> None:
        self._parts = [torch.zeros_like(amounts) for _ in range(1 + block.is_mixed)]
        self.add(block.exit, amounts)

    def add(self, consumer: Consumer, amounts: Tensor) -> None:
        """Add what a consumer passes, [C, K, B, H * W], by the sign of its scale."""
        totals = [part[: len(amounts)] for part in self._parts]
        if consumer.negative is None:
            totals[0] += amounts
            return
        negative = consumer.negative[..., None, None]
        for total, is_part in zip(totals, (1 - negative, negative), strict=True):
            total.addcmul_(amounts, is_part)

    def take(self, start: int, stop: int | None = None) -> Tensor:
        """Return what the producer with these channels gets, [1 or 2, c, K, B, H * W]."""
        return torch.stack([part[start:stop] for part in self._parts])


def _forward_block(block: Block, inputs: Tensor) -> SeenBlock:
    """From the inputs [C, B, H, W] of the entry to what the pool behind the block gives."""
    num_images, height, width = inputs.shape[1:]
    features = Features(block, inputs)
    rows = inputs.flatten(1)
    features.add([rows, rows] if block.entry is None else (block.entry @ rows).split(block.size))
    layers = []
    for layer in block.layers:
        outputs, denominator = features.read(layer.consumer)
        sums, z = torch.addmm(layer.squeeze_bias, outputs.t(), layer.squeeze).chunk(2, 1)
        hidden = sums.clamp(min=0)
        layers.append(SeenLayer(torch.div(outputs, denominator, out=denominator), hidden, z))
        grown = F.conv2d(as_images(hidden, (height, width)), layer.grow, padding=1)
        features.add(grown.transpose(0, 1).flatten(1).split(layer.size))
    outputs, denominator = features.read(block.exit)
    images = outputs.reshape(-1, num_images, height, width)
    size_px = block.pool_px
    pooled = F.avg_pool2d(images, size_px) if size_px else F.adaptive_avg_pool2d(images, 1)
    quotient = torch.div(outputs, denominator, out=denominator)
    return SeenBlock(inputs, features, layers, quotient, pooled, (height, width))


def as_images(hidden: Tensor, sides: tuple[int, int]) -> Tensor:
    """View values [N, M] as images [B, M, H, W], channels last."""
    return hidden.reshape(-1, *sides, hidden.shape[1]).permute(0, 3, 1, 2)


def pool_quotients(seen: SeenBlock) -> Tensor:
    """Return the quotients a / z of the pool behind a block, [C, B, h, w]."""
    return seen.pooled / (seen.pooled + STABILISER)


def _backward_block(block: Block, seen: SeenBlock, passed: Tensor, watcher: Watcher) -> Tensor:
    """From g of the pooled outputs [C, K, B, h, w] to g of the inputs [C, K, B, H, W]."""
    height, width = seen.sides
    _, num_targets, num_images = passed.shape[:3]
    share = passed * pool_quotients(seen).unsqueeze(1)
    watcher.see_absorbed(None, share.sum(0) * STABILISER)
    g = unpool(share * block.exit.size[:, None, None, None, None], block.pool_px, seen.sides)
    passing = Passing(block, _amounts(block.exit, seen.exit, g, watcher))
    for layer, found in zip(block.layers[::-1], seen.layers[::-1], strict=True):
        start = len(found.quotient)
        rows = passing.take(start, start + layer.size)
        images = rows.permute(2, 3, 4, 0, 1).reshape(-1, height, width, rows[:, :, 0, 0, 0].numel())
        g = F.conv2d(images.permute(0, 3, 1, 2), layer.grow_back, padding=1).permute(0, 2, 3, 1)
        ratio = g.reshape(num_targets, *found.hidden.shape) * (found.hidden / found.z)
        watcher.see_ratio(layer, ratio)
        g = layer.squeeze_back @ ratio.flatten(0, 1).t()
        g = g.reshape(start, num_targets, num_images, -1)
        passing.add(layer.consumer, _amounts(layer.consumer, found.quotient, g, watcher))
    watcher.see_block(passed, passing)
    rows = passing.take(0, block.size)
    g = rows[0] if block.entry_back is None else block.entry_back @ rows.flatten(0, 1).flatten(1)
    return g.reshape(-1, num_targets, num_images, height, width)


def _amounts(consumer: Consumer, quotient: Tensor, g: Tensor, watcher: Watcher) -> Tensor:
    """What a consumer passes to the producers, from |s| g of its outputs; [C, K, B, H * W] both."""
    amounts = g * quotient.reshape(len(g), 1, g.shape[2], -1)
    watcher.see_amounts(consumer, amounts)
    return amounts


def unpool(share: Tensor, pool_px: int | None, sides: tuple[int, int]) -> Tensor:
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


def backward_max_pool(stem: Stem, seen: Seen, relevance: Tensor) -> Tensor:
    """Give each maximum the relevance of its window, [B, C, h, w] to [B, C, H, W]."""
    window = *((side, side) for side in stem.max_pool), (1, 1), False
    routed: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
        relevance, seen.first, *window, seen.places
    )
    return routed
