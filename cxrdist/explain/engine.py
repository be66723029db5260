"""The canonical preset without hooks: one forward pass, and one backward pass for all classes.

The rules are those of composite.py; the network is that of canonise.py, folded by fold.py. In the
canonical network each producer (a convolution) has a copy for each consumer (a BatchNorm that reads
its output). Two identities make it unnecessary to compute most of the copies:

- The relevance R_i of an activation a_i is represented as g_i = R_i / a_i. The z-plus rule (Bach et
  al. 2015, PLoS ONE 10(7), equation 60 with beta 0), R_i = a_i sum_j W+_ji R_j / z_j, then becomes
  g = W+^T (q g'), where the quotients q = a / z are the same for all classes.
- All copies of a producer share their input and, up to a factor, their weights. So the values from
  their consumers are added before the transposed convolution, which runs once per producer.

Layout: the features of a block are [channels, images, height, width], so that a concatenation is a
range of rows and a 1x1 convolution is one matrix product; hidden layers are [images, height, width,
channels], which a 3x3 convolution reads without a copy. Targets precede the images in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.models.densenet import DenseNet
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from cxrdist.explain.attribution import STABILISER, Attribution, Rules, concatenate
from cxrdist.explain.canonise import check
from cxrdist.explain.fold import Block, Consumer, Folded, Layer, Stem, fold

MAPS_AT_ONCE = 16
"""Largest number of maps (images times targets) in one backward pass, which bounds the memory."""


class Engine:
    """LRP of a DenseNet by the canonical preset, with its own folded copy of the weights."""

    @torch.no_grad()
    def __init__(self, network: DenseNet, rules: Rules) -> None:
        """Fold a copy of the network; the network itself does not change."""
        check(network)
        self._folded = fold(network, rules.biases)
        self._rules = rules

    @torch.no_grad()
    def attribute(self, inputs: Tensor, targets: list[int]) -> Attribution:
        """Return the relevance of normalised images [B, C, H, W] for the target class indices."""
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


class Watcher:
    """Receives intermediate values of a backward pass; a subclass overrides what it uses."""

    def see_amounts(self, consumer: Consumer, amounts: Tensor) -> None:
        """Receive the values from a consumer to its producers, |s| R / z, [C, K, B, H * W]."""

    def see_ratio(self, layer: Layer, ratio: Tensor) -> None:
        """Receive R / z of a 1x1 convolution, [K, N, M]."""

    def see_absorbed(self, bias: Tensor | None, stabiliser: Tensor) -> None:
        """Receive the relevance that bias and stabiliser of another rule absorb, [K, B, ...]."""

    def see_block(self, passed: Tensor, passing: "Passing") -> None:
        """Receive what a block's backward pass starts with, [C, K, B, h, w], and its sums."""


def forward_pass(folded: Folded, inputs: Tensor) -> "Seen":
    """Compute logits, and the values that backward passes need, for images [B, C, H, W]."""
    stem = folded.stem
    first = F.conv2d(inputs, stem.weight, stem.bias, *stem.stride_padding).relu_()
    pooled, max_indices = F.max_pool2d(first, *stem.max_pool, return_indices=True)
    features = pooled.transpose(0, 1).contiguous()
    blocks = [_forward_block(folded.blocks[0], features)]
    for block in folded.blocks[1:]:
        blocks.append(_forward_block(block, blocks[-1].pooled))
    logits = F.linear(blocks[-1].pooled.flatten(1).t(), folded.weight, folded.bias)
    return Seen(inputs, first, max_indices, features, blocks, logits)


def backward_pass(
    folded: Folded, rules: Rules, seen: "Seen", starts: Tensor, watcher: Watcher
) -> Tensor:
    """Pass relevance from the logits back to the pixels, and return it, [K, B, H, W].

    `starts` [K, B, classes] are the factors of the logits in the initial relevance.
    """
    passed = _backward_head(folded, rules, seen.logits, starts, watcher)
    for block, seen_block in zip(folded.blocks[::-1], seen.blocks[::-1], strict=True):
        passed = _backward_block(block, seen_block, passed, watcher)
    # From g to relevance, which max pool and stem pass on.
    pooled = (seen.features.unsqueeze(1) * passed).permute(1, 2, 0, 3, 4).contiguous()
    first = torch.stack([backward_max_pool(folded.stem, seen, r) for r in pooled])
    if rules.flat:
        return _backward_flat(folded.stem, seen, first, watcher)
    return _backward_z_plus(folded.stem, rules, seen, first, watcher)


def head_quotients(rules: Rules, folded: Folded, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stabiliser of the epsilon rule, and logit / (z + stabiliser), of each logit."""
    z = logits if rules.biases else logits - folded.bias
    # The sign of 0 is 1, as in zennit: torch.sign would give 0.
    stabiliser = rules.epsilon * (1 - 2 * (z < 0).to(z.dtype))
    return stabiliser, logits / (z + stabiliser)


def _backward_head(
    folded: Folded, rules: Rules, logits: Tensor, starts: Tensor, watcher: Watcher
) -> Tensor:
    """Apply the epsilon rule: starts [K, B, classes] to g of pooled features [C, K, B, 1, 1]."""
    stabiliser, quotient = head_quotients(rules, folded, logits)
    ratio = starts * quotient
    watcher.see_absorbed(ratio * folded.bias * rules.biases, ratio * stabiliser)
    return (ratio @ folded.weight).movedim(2, 0)[..., None, None]


def window_sizes(stem: Stem, inputs: Tensor) -> Tensor:
    """Return the number of input values in each window of the first convolution, [1, 1, h, w]."""
    ones = torch.ones_like(stem.weight[:1, :1])
    return (
        F.conv2d(torch.ones_like(inputs[:1, :1]), ones, None, *stem.stride_padding)
        * inputs.shape[1]
    )


def _backward_flat(stem: Stem, seen: "Seen", relevance: Tensor, watcher: Watcher) -> Tensor:
    """Spread relevance [K, B, C, h, w] evenly over the windows, to [K, B, H, W]."""
    inputs = seen.inputs
    ratio = relevance.sum(2) / (window_sizes(stem, inputs)[0] + STABILISER)
    watcher.see_absorbed(None, ratio * STABILISER)
    size = (ratio.shape[0] * ratio.shape[1], 1, *inputs.shape[2:])
    ones = torch.ones_like(stem.weight[:1, :1])
    shares = conv2d_input(size, ones, ratio.flatten(0, 1).unsqueeze(1), *stem.stride_padding)
    # Each channel of the input gets the same share, and the map is their sum.
    return shares.reshape(*ratio.shape[:2], *size[2:]) * inputs.shape[1]


def _backward_z_plus(
    stem: Stem, rules: Rules, seen: "Seen", relevance: Tensor, watcher: Watcher
) -> Tensor:
    """Apply z-plus to inputs of both signs, by x+ w+ and x- w-; shapes as in `_backward_flat`."""
    weight = torch.cat([stem.weight.clamp(min=0), (-stem.weight).clamp(min=0)], 1)
    parts = torch.cat([seen.inputs.clamp(min=0), (-seen.inputs).clamp(min=0)], 1)
    bias = stem.bias.clamp(min=0) * rules.biases
    ratio = relevance / (F.conv2d(parts, weight, bias, *stem.stride_padding) + STABILISER)
    per_channel = ratio.flatten(3).sum(3)
    watcher.see_absorbed(per_channel @ bias, per_channel.sum(2) * STABILISER)
    shares = [parts * conv2d_input(parts.shape, weight, one, *stem.stride_padding) for one in ratio]
    return torch.stack(shares).sum(2)


@dataclass(frozen=True)
class SeenLayer:
    """Values of a dense layer that backward passes need. N is B * H * W."""

    quotient: Tensor
    """a / z of the consumer [C, N]."""
    hidden: Tensor
    """Output of the 1x1 convolution and its ReLU [N, M]."""
    z: Tensor
    """Denominator of the 1x1 convolution [N, M]."""


@dataclass(frozen=True)
class SeenBlock:
    """Values of a block that backward passes need."""

    inputs: Tensor
    """[C, B, H, W]."""
    features: "Features"
    layers: list[SeenLayer]
    exit: Tensor
    """Quotients a / z of the exit [C, N]."""
    pooled: Tensor
    """Output of the pool after the block [C, B, h, w]."""
    sides: tuple[int, int]
    """H, W before the pool."""


@dataclass(frozen=True)
class Seen:
    """Values of the forward pass that backward passes need."""

    inputs: Tensor
    """[B, C, H, W]."""
    first: Tensor
    """Output of the first convolution and its ReLU [B, C, H, W]."""
    max_indices: Tensor
    """Positions of the maxima in the windows of the max pool [B, C, h, w]."""
    features: Tensor
    """Output of the max pool [C, B, h, w]."""
    blocks: list[SeenBlock]
    logits: Tensor
    """[B, classes]."""


class _Ledger(Watcher):
    """Sums the relevance absorbed by biases and stabilisers, float64 [2, K, B]."""

    def __init__(self, logits: Tensor) -> None:
        self.shares = logits.new_zeros(2, *logits.shape, dtype=torch.float64)

    def see_amounts(self, consumer: Consumer, amounts: Tensor) -> None:
        self._book(consumer.absorbed @ amounts.flatten(1))

    def see_ratio(self, layer: Layer, ratio: Tensor) -> None:
        self._book((ratio @ layer.absorbed).movedim(2, 0))

    def see_absorbed(self, bias: Tensor | None, stabiliser: Tensor) -> None:
        bias = torch.zeros_like(stabiliser) if bias is None else bias
        self._book(torch.stack([bias, stabiliser]))

    def _book(self, absorbed: Tensor) -> None:
        """Add relevance absorbed at each position, [2, K * B * positions] in any shape."""
        values = absorbed.reshape(*self.shares.shape, -1)
        self.shares += values.sum(3, dtype=torch.float64)


class Features:
    """The concatenated outputs of a block's producers, with all, positive and negative weights.

    Attributes:
        y: outputs [C, N].
        plus: outputs with the positive weights W+ only [C, N].
    """

    def __init__(self, block: Block, inputs: Tensor) -> None:
        shape = len(block.exit.shift), inputs[0].numel()
        self.y, self.plus = inputs.new_empty(shape), inputs.new_empty(shape)
        self._minus = inputs.new_empty(shape) if block.with_minus else None
        self._count = 0

    def add(self, outputs: Sequence[Tensor]) -> None:
        """Add a producer's outputs with W, with W+ and, if given, with W-, [c, N] each."""
        rows = slice(self._count, self._count + len(outputs[0]))
        self.y[rows], self.plus[rows] = outputs[0], outputs[1]
        if self._minus is not None:
            # Only the first block's entry has two outputs, which are equal: no weight is negative.
            self._minus[rows] = outputs[2] if len(outputs) > 2 else outputs[1] - outputs[0]
        self._count = rows.stop

    def read(self, consumer: Consumer) -> tuple[Tensor, Tensor]:
        """Return a consumer's outputs for these features and its z-plus, [C, N] each."""
        count = len(consumer.scale)
        outputs = consumer.read(self.y[:count])
        minus = None if self._minus is None else self._minus[:count]
        return outputs, consumer.denominator(self.plus[:count], minus, outputs)


class Passing:
    """Sums of the values from consumers to a block's producers: for W+, and for W- if needed."""

    def __init__(self, block: Block, amounts: Tensor) -> None:
        self._sums = [torch.zeros_like(amounts) for _ in range(1 + block.is_mixed)]
        self.add(block.exit, amounts)

    def add(self, consumer: Consumer, amounts: Tensor) -> None:
        """Add the values of a consumer, [C, K, B, H * W], by the sign of its scale."""
        totals = [rows[: len(amounts)] for rows in self._sums]
        if consumer.negative is None:
            totals[0] += amounts
            return
        negative = consumer.negative[..., None, None]
        for total, mask in zip(totals, (1 - negative, negative), strict=True):
            total.addcmul_(amounts, mask)

    def take(self, start: int, stop: int | None = None) -> Tensor:
        """Return the sums for the producer with these channels, [1 or 2, c, K, B, H * W]."""
        return torch.stack([rows[start:stop] for rows in self._sums])


def _forward_block(block: Block, inputs: Tensor) -> SeenBlock:
    """Compute a block from its inputs [C, B, H, W] to the output of the pool after it."""
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
    """Return a view of values [N, M] as images [B, M, H, W], channels last."""
    return hidden.reshape(-1, *sides, hidden.shape[1]).permute(0, 3, 1, 2)


def pool_quotients(seen: SeenBlock) -> Tensor:
    """Return the quotients a / z of the pool behind a block, [C, B, h, w]."""
    return seen.pooled / (seen.pooled + STABILISER)


def _backward_block(block: Block, seen: SeenBlock, passed: Tensor, watcher: Watcher) -> Tensor:
    """Return g of a block's inputs [C, K, B, H, W] from g of pooled outputs [C, K, B, h, w]."""
    height, width = seen.sides
    _, num_targets, num_images = passed.shape[:3]
    share = passed * pool_quotients(seen).unsqueeze(1)
    watcher.see_absorbed(None, share.sum(0) * STABILISER)
    # With |s| of the exit, as `squeeze_back` has that of each layer.
    g = unpool(share * block.exit.magnitude[:, None, None, None, None], block.pool_px, seen.sides)
    passing = Passing(block, _amounts(block.exit, seen.exit, g, watcher))
    for layer, seen_layer in zip(block.layers[::-1], seen.layers[::-1], strict=True):
        start = len(seen_layer.quotient)
        rows = passing.take(start, start + layer.size)
        images = rows.permute(2, 3, 4, 0, 1).reshape(-1, height, width, rows[:, :, 0, 0, 0].numel())
        g = F.conv2d(images.permute(0, 3, 1, 2), layer.grow_back, padding=1).permute(0, 2, 3, 1)
        hidden = seen_layer.hidden
        ratio = g.reshape(num_targets, *hidden.shape) * (hidden / seen_layer.z)
        watcher.see_ratio(layer, ratio)
        g = layer.squeeze_back @ ratio.flatten(0, 1).t()
        g = g.reshape(start, num_targets, num_images, -1)
        passing.add(layer.consumer, _amounts(layer.consumer, seen_layer.quotient, g, watcher))
    watcher.see_block(passed, passing)
    rows = passing.take(0, block.size)
    g = rows[0] if block.entry_back is None else block.entry_back @ rows.flatten(0, 1).flatten(1)
    return g.reshape(-1, num_targets, num_images, height, width)


def _amounts(consumer: Consumer, quotient: Tensor, g: Tensor, watcher: Watcher) -> Tensor:
    """Return what a consumer passes to its producers, given |s| g; both [C, K, B, H * W]."""
    amounts = g * quotient.reshape(len(g), 1, g.shape[2], -1)
    watcher.see_amounts(consumer, amounts)
    return amounts


def unpool(share: Tensor, pool_px: int | None, sides: tuple[int, int]) -> Tensor:
    """Spread [C, K, B, h, w] over the windows of an average pool, to [C, K, B, H * W].

    For a global pool (``pool_px`` None) return [C, K, B, 1], to be broadcast.
    """
    if pool_px is None:
        return share.flatten(3) / (sides[0] * sides[1])
    height, width = share.shape[3:]
    windows = (share / pool_px**2)[..., :, None, :, None].expand(
        *share.shape[:4], pool_px, width, pool_px
    )
    spread = windows.reshape(*share.shape[:3], height * pool_px, width * pool_px)
    # An odd side leaves a row or column that no window reads.
    padding = (0, sides[1] - spread.shape[4], 0, sides[0] - spread.shape[3])
    return F.pad(spread, padding).flatten(3)


def backward_max_pool(stem: Stem, seen: Seen, relevance: Tensor) -> Tensor:
    """Assign the relevance of each window to its maximum, [B, C, h, w] to [B, C, H, W]."""
    window = *((side, side) for side in stem.max_pool), (1, 1), False  # dilation, ceil_mode
    routed: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
        relevance, seen.first, *window, seen.max_indices
    )
    return routed
