"""BatchNorm with training statistics over the images of all ranks.

PyTorch's SyncBatchNorm does not run on CPUs, and in each layer the host waits to learn which ranks
have images. This one runs on any device and never waits. It uses BatchNorm's evaluation kernels,
with the global mean and variance in place of the running ones.
"""

from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor
from torch.autograd.function import once_differentiable

from cxrdist.distributed import add_over_ranks, stack_over_ranks


class BatchNorm(BatchNormAct2d):
    """BatchNorm and ReLU. Its network counts the passes (`Classifier.count_pass`).

    Attributes:
        shares: None for statistics of this rank alone. Otherwise [ranks + 2] in the weights' dtype:
            the share of each rank in the images of the pass, then the total number of images, and
            last whether this rank has images (1 or 0). The caller fills it before each pass.
    """

    shares: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return normalised and rectified features, [B, C, H, W]."""
        if not self.training or self.momentum is None:
            return super().forward(x)
        # Not timm's forward: in training it counts the pass, with an operation per BatchNorm.
        running = (self.running_mean, self.running_var)
        if self.shares is None:
            y = torch.batch_norm(
                x, self.weight, self.bias, *running, True, self.momentum, self.eps, True
            )
        else:
            y, mean, var = _OverRanks.apply(x, self.weight, self.bias, self.shares, self.eps)
            with torch.no_grad():
                values = x.shape[2] * x.shape[3] * self.shares[-2]
                unbiased = var * (values / (values - 1).clamp(min=1))
                torch._foreach_lerp_([*running], [mean, unbiased], self.momentum)
        return self.act(y)


class _OverRanks(torch.autograd.Function):
    """Normalise by the mean and variance over the images of all ranks (Ioffe & Szegedy 2015)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shares: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised [B, C, H, W], and mean and biased variance over all ranks, [C] each."""
        running: tuple[Tensor | None, Tensor | None] = (None, None)
        if x.dtype != weight.dtype:  # without float32 buffers they would be in half precision
            running = torch.zeros_like(weight), torch.zeros_like(weight)
        local = torch.cat(torch.batch_norm_update_stats(x, *running, 0.0))
        means, variances = stack_over_ranks(local).chunk(2, dim=1)
        # Not a matrix product, which autocast would compute in half precision.
        rank_shares = shares[:-2].unsqueeze(1)
        mean = (rank_shares * means).sum(0)
        deviations = means - mean
        var = (rank_shares * torch.addcmul(variances, deviations, deviations)).sum(0)
        ctx.save_for_backward(x, weight, mean, var, shares)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # else autograd makes zero gradients of mean and var
        y = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, True)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Return the gradients; through the statistics they are affine in x for each channel."""
        x, weight, mean, var, shares = ctx.saved_tensors
        direct, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            *(gradient, x, weight, mean, var, None, None, False, ctx.eps, [True] * 3)
        )
        sum_weight, sum_bias = add_over_ranks(torch.cat([grad_weight, grad_bias])).chunk(2)
        deviation = (var + ctx.eps).rsqrt()
        # 0 on a rank without images: the image that it computes instead is in no statistics.
        per_value = shares[-1] / (shares[-2] * x.shape[2] * x.shape[3])
        scale = weight * deviation * per_value
        slope = scale * deviation * sum_weight
        shift = torch.addcmul(scale * sum_bias, slope, mean, value=-1)
        per_channel = (1, -1, 1, 1)
        direct.sub_(torch.addcmul(shift.view(per_channel), x, slope.view(per_channel)))
        # Weight and bias: this rank's own, because DDP averages gradients of parameters.
        return direct, grad_weight, grad_bias, None, None
