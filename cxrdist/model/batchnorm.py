"""BatchNorm whose statistics, in training, are those of the whole step over all ranks.

PyTorch's SyncBatchNorm refuses the CPU and reads on the host, in each layer, which ranks have
images. This one runs on any device, reads nothing, and its kernels are BatchNorm's own in
evaluation mode: the global mean and variance stand where the running ones would.
"""

from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor
from torch.autograd.function import once_differentiable

from cxrdist.distributed import add_over_ranks, stack_over_ranks


class BatchNorm(BatchNormAct2d):
    """BatchNorm and ReLU. It leaves counting to its network (`Classifier.count_pass`).

    Attributes:
        shares: [ranks + 2] in the weights' dtype where the statistics are those of all ranks, else
            None: the share of each rank in the images of the pass, their number, and 1, or 0 on a
            rank that has none of them. The caller fills it before each pass.
    """

    shares: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalised and rectified features of [B, C, H, W]."""
        if not self.training or self.momentum is None:
            return super().forward(x)
        moving = (self.running_mean, self.running_var)
        if self.shares is None:
            y = torch.batch_norm(
                x, self.weight, self.bias, *moving, True, self.momentum, self.eps, True
            )
        else:
            y, mean, var = _OverRanks.apply(x, self.weight, self.bias, self.shares, self.eps)
            _move(moving, mean, var, self.shares, x.shape[2] * x.shape[3], self.momentum)
        return self.act(y)


@torch.no_grad()
def _move(
    moving: tuple[Tensor, Tensor],
    mean: Tensor,
    var: Tensor,
    shares: Tensor,
    num_pixels: int,
    momentum: float,
) -> None:
    """Move the running statistics towards a pass's mean and unbiased variance."""
    values = num_pixels * shares[-2]
    unbiased = var * (values / (values - 1).clamp(min=1))
    torch._foreach_lerp_(list(moving), [mean, unbiased], momentum)


class _OverRanks(torch.autograd.Function):
    """Normalise by the mean and variance over the images of all ranks (Ioffe & Szegedy 2015)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shares: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, C, H, W] normalised; and the mean and the biased variance of all, [C]."""
        moving: tuple[Tensor | None, Tensor | None] = (None, None)
        if x.dtype != weight.dtype:  # those of half precision would be in it, too
            moving = torch.zeros_like(weight), torch.zeros_like(weight)
        local = torch.cat(torch.batch_norm_update_stats(x, *moving, 0.0))
        means, variances = stack_over_ranks(local).chunk(2, dim=1)
        parts = shares[:-2].unsqueeze(1)  # autocast would shorten a matrix product
        mean = (parts * means).sum(0)
        apart = means - mean
        var = (parts * torch.addcmul(variances, apart, apart)).sum(0)
        ctx.save_for_backward(x, weight, mean, var, shares)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # or zeros are made as theirs
        y = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, True)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Return the gradient through the statistics is one affine map of x in each channel."""
        x, weight, mean, var, shares = ctx.saved_tensors
        direct, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            *(gradient, x, weight, mean, var, None, None, False, ctx.eps, [True] * 3)
        )
        sum_weight, sum_bias = add_over_ranks(torch.cat([of_weight, of_bias])).chunk(2)
        deviation = (var + ctx.eps).rsqrt()
        per_value = shares[-1] / (shares[-2] * x.shape[2] * x.shape[3])
        scale = weight * deviation * per_value
        slope = scale * deviation * sum_weight
        shift = torch.addcmul(scale * sum_bias, slope, mean, value=-1)
        per_channel = (1, -1, 1, 1)
        direct.sub_(torch.addcmul(shift.view(per_channel), x, slope.view(per_channel)))
        return direct, of_weight, of_bias, None, None
