"""An explanation: the relevance of each pixel, and the ledger of the logit."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

STABILISER = 1e-6
"""Added to the denominators of all rules except epsilon's, to avoid division by zero."""


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


def concatenate(chunks: Sequence[Attribution]) -> Attribution:
    """Concatenate the targets of several attributions of one batch, in order."""
    names = [column.name for column in fields(Attribution)]
    return Attribution(*(torch.cat([getattr(c, name) for c in chunks], 1) for name in names))
