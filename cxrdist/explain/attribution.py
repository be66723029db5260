"""An explanation: the relevance of each pixel, and the shares that make up the logit."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

# As in zennit's rules, with which the engine's maps are compared.
STABILISER = 1e-6
"""Added to the denominators of all rules except epsilon's, to avoid division by zero."""


class Rules(NamedTuple):
    """Settings of the canonical preset (composite.py)."""

    flat: bool = True
    """Whether the first convolution has the flat rule; if not, z-plus."""
    biases: bool = True
    """Whether biases are part of the denominators and absorb their share."""
    epsilon: float = 0.1
    """The epsilon of the linear layer's rule, in units of the logit."""


@dataclass(frozen=True)
class Attribution:
    """Relevance of a batch for K targets, all in units of the logit and in the dtype of the model.

    ``logits = relevance_sum + bias_share + epsilon_share`` up to rounding. The shares are summed
    layer by layer from the formulas of the rules and not computed as a remainder, so the equation
    is a check. They are signed and not divided by the logit.

    Attributes:
        relevance: [B, K, H, W], positive for the target, negative against it; summed over the
            channels of the normalised image.
        logits: [B, K].
        relevance_sum: [B, K], relevance summed over the pixels.
        bias_share: [B, K], absorbed by the biases; NaN for rules without a ledger.
        epsilon_share: [B, K], absorbed by epsilon and the stabilisers of other rules, or NaN.
    """

    relevance: Tensor = field(repr=False)
    logits: Tensor
    relevance_sum: Tensor
    bias_share: Tensor
    epsilon_share: Tensor


class Ledger:
    """Relevance absorbed in a backward pass by biases, and by epsilon and stabilisers, [B] each."""

    bias: Tensor
    epsilon: Tensor

    def open(self, logit: Tensor, start: float = 0.0) -> None:
        """Start a new pass from a logit [B]; the shares are float64."""
        self.bias = torch.full_like(logit, start, dtype=torch.float64)
        self.epsilon = torch.full_like(logit, start, dtype=torch.float64)

    def close(self, logit: Tensor, relevance: Tensor) -> Attribution:
        """Return the attribution of the logit [B], from the relevance [B, C, H, W] of its pass."""
        sums = sum_per_image(relevance), self.bias, self.epsilon
        columns = relevance.sum(1), logit, *(value.to(logit.dtype) for value in sums)
        return Attribution(*(column.unsqueeze(1) for column in columns))


def sum_per_image(values: Tensor) -> Tensor:
    """Sum [B, ...] to float64 [B]."""
    return values.flatten(1).sum(1, dtype=torch.float64)


def concatenate(chunks: Sequence[Attribution]) -> Attribution:
    """Concatenate the targets of several attributions of one batch, in order."""
    # In the order of the fields, which is that of the constructor's arguments.
    columns = zip(*(vars(chunk).values() for chunk in chunks), strict=True)
    return Attribution(*(torch.cat(column, 1) for column in columns))
