"""Dropout with draws for the images of a whole step, whichever rank and pass takes them."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """Dropout that trains the same network on any number of ranks, and in any number of passes.

    Each rank draws for all images of the step, from the same random state, and uses the draws of
    its own. They are few numbers: dropout comes late, in most networks after the pooling.

    Attributes:
        rows: int64 [B], positions in the step of the images of the next pass; None if they are all.
        num_images: of the step over all ranks; without `rows`, those of the pass.
    """

    rows: Tensor | None = None
    num_images: int = 0

    def forward(self, input: Tensor) -> Tensor:
        """Return features [B, ...], some of them 0 in training and the others scaled up."""
        if not self.training or self.p == 0:
            return super().forward(input)
        # Also without `rows`, so that the draws are the same ones: on a GPU they depend on layout.
        num_images = len(input) if self.rows is None else self.num_images
        # 1 / (1 - p) in bfloat16 is up to 0.2 % off, for all features alike.
        dtype = torch.promote_types(input.dtype, torch.float32)
        factors = super().forward(input.new_ones(num_images, *input.shape[1:], dtype=dtype))
        factors = factors if self.rows is None else factors[self.rows]
        return (input * factors).to(input.dtype)
